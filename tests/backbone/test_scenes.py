"""Sizes, places and reproducibility of scenes."""

from pathlib import Path

import numpy as np
import pytest

from backbone.dataset import find_core, mark_core, sampling_weights
from backbone.scenes import compose_scenes, place, side_of
from backbone.text import TextEncoder

SETTINGS = {"count": 40, "pair_fraction": 0.5, "seed": 3}


def squares() -> np.ndarray:
    """Four images: a filled square of another grey level each."""
    images = np.full((4, 64, 64, 3), 255, np.uint8)
    for level, image in enumerate(images):
        image[2:62, 2:62] = 40 * level
    return images


@pytest.mark.parametrize("weight", [0.2, 0.5, 0.8])
def test_two_things_fit_and_share_the_area_by_weight(weight: float) -> None:
    one, other = side_of(weight, 2), side_of(1 - weight, 2)
    assert one**2 / other**2 == pytest.approx(weight / (1 - weight))
    assert one + other < 1.06


def test_a_thing_grows_with_its_weight() -> None:
    areas = []
    for weight in (0.1, 0.5, 1.0):
        canvas = np.full((64, 64, 3), 255, np.uint8)
        place(canvas, squares()[1], side_of(weight, 1), 0.5, 0.5)
        areas.append(int((canvas < 128).all(2).sum()))
    assert areas == sorted(areas)
    assert areas[0] < 0.15 * areas[2]


def test_scenes_show_what_they_name() -> None:
    things = np.array(["dog", "cat", "bell", "owl"])
    scenes = compose_scenes(squares(), things, np.array([1.0, 1.0, 1.0, 0.0]), SETTINGS)
    again = compose_scenes(squares(), things, np.array([1.0, 1.0, 1.0, 0.0]), SETTINGS)
    assert all(np.array_equal(a.pixels, b.pixels) and a.weight == b.weight for a, b in zip(scenes, again, strict=True))
    assert {scene.second >= 0 for scene in scenes} == {True, False}
    for scene in scenes:
        assert 3 not in (scene.first, scene.second)
        assert scene.first != scene.second
        levels = {int(v) for v in np.unique(scene.pixels[..., 0])}
        for row in {scene.first, scene.second} - {-1}:
            assert min(abs(level - 40 * row) for level in levels) <= 4


def test_weights_favor_core_images_and_rare_things_and_leave_validation_out() -> None:
    plain = {"split": "train", "sounds": True, "similarity": 0.9, "core": []}
    rows = [plain | {"thing": "dog"}] * 4
    rows += [
        plain | {"thing": "cat"},
        plain | {"thing": "cat", "similarity": 0.7},
        plain | {"thing": "cat", "split": "validation"},
        plain | {"thing": "owl", "sounds": False},
        plain | {"thing": "bell", "core": ["a bell"]},
        plain | {"thing": "gong", "core": ["a bell", "a gong"], "sounds": False},
    ]
    weights = sampling_weights(rows, balance=0.5, weak_weight=0.6, rest_weight=0.1)
    assert weights[:4] == pytest.approx(0.05)
    assert weights[4:6] == pytest.approx([0.1 * 2**-0.5, 0.06 * 2**-0.5])
    assert not weights[6:8].any()
    assert weights[8:] == pytest.approx([2**-0.5, 2**-0.5 + 1])


def test_core_images_are_those_nearest_to_a_source(tiny_data: Path) -> None:
    row = {"split": "train", "sounds": True, "similarity": 0.9, "package": "flat", "thing": "dog"}
    rows = [
        row | {"name": "dog"},
        row | {"name": "dog", "package": "clip art"},
        row | {"name": "dog", "split": "validation"},
        row | {"name": "cat", "thing": "cat"},
    ]
    settings = {"per_source": 1, "similarity": [0.999, 0.99], "margin": 1e-3, "penalty": {"clip art": 0.15}}
    encoder = TextEncoder(tiny_data / "dataset" / "text")
    core = find_core(rows, ["a cat", "a dog", "bell"], encoder, settings)
    assert core == {3: ["a cat"], 0: ["a dog"]}
    loose = settings | {"similarity": [-1.0]}
    assert find_core(rows[:1], ["a cat", "a dog"], encoder, loose) == {0: ["a cat", "a dog"]}, "the only image of both"
    assert find_core(rows, ["a cat", "a dog"], encoder, loose | {"per_source": 4}) == {3: ["a cat"], 0: ["a dog"], 1: ["a dog"]}
    assert find_core(rows, ["a cat"], encoder, loose, {"a cat": {"dog"}}) == {0: ["a cat"]}, "a name chosen by hand"
    captions = {"": 0, "dog": 1}
    rows = [entry | {"captions": [1]} for entry in rows]
    mark_core(rows, core, captions)
    assert [entry["core"] for entry in rows] == [["a dog"], [], [], ["a cat"]]
    assert [captions.get(text) for text in ("a dog", "a cat")] == [2, 3]
    assert rows[0]["captions"] == [1, 2, 2, 2]
    assert rows[1]["captions"] == [1]
