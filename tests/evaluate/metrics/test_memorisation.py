"""Memorisation on images whose distances are known, and the lookup baseline on embeddings whose order is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline_steps.evaluate.audio_captions import caption_audio, tag_text
from pipeline_steps.evaluate.evaluation_plan import EvalAudio, EvalPair, EvaluationPlan
from pipeline_steps.evaluate.metrics import memorisation
from pipeline_steps.evaluate.metrics.memorisation import distinct_samples, memorisation_block, nearest_images
from pipeline_steps.evaluate.nearest_training import mix_vector, nearest_training_images
from pipeline_steps.models.audio.yamnet import YamNet
from tests.evaluate.synthetic_dataset import CONFIG


def gray(level: int) -> np.ndarray:
    return np.full((8, 8, 3), level, np.uint8)


@pytest.mark.parametrize("held", [1, 400, 50_000_000])
def test_nearest_images_equal_a_direct_comparison(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(memorisation, "CHUNK_VALUES", held)
    rng = np.random.default_rng(0)
    images, references = (rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8) for count in (7, 5))
    images[3] = references[4]
    found = nearest_images(images, list(references))
    direct = np.sqrt(((images[:, None].astype(float) - references[None]) ** 2).mean((2, 3, 4)))
    np.testing.assert_allclose(found.rmse, direct.min(1), atol=0.05)
    assert found.index.tolist() == direct.argmin(1).tolist()
    assert found.rmse[3] < 0.05
    with pytest.raises(ValueError, match="no reference"):
        nearest_images(images, [])


def test_samples_are_distinct_beyond_twenty_gray_levels() -> None:
    assert distinct_samples(np.stack([gray(0), gray(30), gray(60)]))
    assert not distinct_samples(np.stack([gray(0), gray(30), gray(49)]))


def plan_of(training: dict[str, str]) -> EvaluationPlan:
    clips = tuple(EvalAudio(f"s{row}", f"g{row // 2}", None, ((f"s{row}", 0.0),)) for row in range(4))
    pairs = tuple(EvalPair(f"p{row}", f"i{row}", f"i{row}", row) for row in range(4))
    rows: list[dict[str, Any]] = [
        {"image_id": image, "tracks": [{"audio_id": audio, "gain_db": 0.0}]} for image, audio in training.items()
    ]
    return EvaluationPlan(clips, {"test": pairs, "gold": ()}, training_pairs=tuple(rows))


def test_copies_are_counted_and_independent_images_are_not() -> None:
    levels = {"t0": 0, "t1": 100, "t2": 200, **{f"i{row}": 40 + 10 * row for row in range(4)}}
    plan = plan_of({"t0": "a", "t1": "b", "t2": "c"})
    copied = np.stack([np.stack([gray(0), gray(100)])] * 4)
    block = memorisation_block(plan, copied, lambda image_id: gray(levels[image_id]), CONFIG, 16_000)
    assert block is not None
    assert set(block["sets"]) == {"test"}
    row, held_out = block["sets"]["test"]["model"], block["sets"]["test"]["held_out_images"]
    assert row["nearest_rmse"]["value"] == pytest.approx(0, abs=0.05)
    assert row["copy_fraction"] | {"value": 1.0, "n": 8, "clusters": 2} == row["copy_fraction"]
    assert row["recalled_fraction"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert row["recalled_fraction"]["low"] is None
    assert row["diverse_fraction"]["value"] == 1.0
    assert held_out["nearest_rmse"]["value"] == pytest.approx(np.mean([40, 50, 40, 30]), abs=0.05)
    assert held_out["copy_fraction"]["value"] == 0.0
    collapsed = np.stack([np.stack([gray(150), gray(155)])] * 4)
    block = memorisation_block(plan, collapsed, lambda image_id: gray(levels[image_id]), CONFIG, 16_000)
    assert block is not None
    row = block["sets"]["test"]["model"]
    assert (row["copy_fraction"]["value"], row["diverse_fraction"]["value"]) == (0.0, 0.0)


def test_a_large_pool_is_subsampled_by_the_seed() -> None:
    plan = plan_of({f"t{row}": f"a{row}" for row in range(9)})
    read: list[str] = []

    def load(image_id: str) -> np.ndarray:
        read.append(image_id)
        return gray(int(image_id[1:]) * 20)

    config = CONFIG.model_copy(update={"memorisation_images": 4})
    images = np.zeros((4, 2, 8, 8, 3), np.uint8)
    block = memorisation_block(plan, images, load, config, 16_000)
    assert block is not None
    assert (block["training_images"], block["compared_images"]) == (9, 4)
    first = [name for name in read if name.startswith("t")]
    memorisation_block(plan, images, load, config, 16_000)
    assert [name for name in read if name.startswith("t")] == first * 2
    assert memorisation_block(plan_of({}), images, load, config, 16_000) is None


def test_the_lookup_returns_the_images_of_the_nearest_sound() -> None:
    vectors = {f"s{row}": np.eye(4, dtype=np.float32)[row] for row in range(3)}  # s3 has no embedding
    vectors |= {"a": np.array([0.8, 0.6, 0, 0], np.float32), "b": np.array([0, 0, 1, 0], np.float32)}
    plan = plan_of({"t0": "a", "t1": "b", "t2": "b", "t3": "unknown"})
    assert nearest_training_images(plan, vectors) == [("t0",), ("t0",), ("t1", "t2"), ()]
    assert nearest_training_images(plan_of({"t3": "unknown"}), vectors) == [()] * 4
    mixed = mix_vector((("s0", 0.0), ("s1", 20.0)), vectors)
    assert mixed is not None
    np.testing.assert_allclose(mixed, np.array([1, 10, 0, 0]) / np.sqrt(101))


def test_captions_are_the_names_of_the_best_tags(assets: Any) -> None:
    names = ["Dog", "Bark", "Cat", "Rain"]
    assert tag_text(np.array([0.8, 0.9, 0.1, 0.44]), names) == "bark, dog"
    assert tag_text(np.array([0.2, 0.2, 0.2, 0.2]), names) == "dog, bark, cat"
    silence = caption_audio(YamNet(assets).load(), np.zeros(48_000, np.float32))
    assert silence.startswith("silence")
