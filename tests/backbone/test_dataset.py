"""Name cleaning, decoding and the leak filter."""

import io
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from backbone import dataset, leaks, names


@pytest.mark.parametrize(
    ("path", "phrase"),
    [
        ("animals/birds/acquila_architetto_franc_01.png", "eagle, bird"),
        ("animals/birds/duck_yellow_kurt_cagle_.png", "duck yellow, bird"),
        ("animals/mammals/horses/cavallo_architetto_franc_03.png", "horse"),
        ("recreation/music/trumpet_b_flat__ganson.png", "trumpet flat, musical instrument"),
        ("unsorted/motosega.png", "chainsaw"),
        ("animals/mammals/shaezy_peterm_.png", "sheep, animal"),
        ("animals/fish/bofish_massimo_aiello_r.png", "fish"),
    ],
)
def test_openclipart_names_are_english_words(path: str, phrase: str) -> None:
    vocabulary = {"duck", "trumpet", "flat"}
    assert names.openclipart_name(PurePosixPath(path), vocabulary) == phrase


@pytest.mark.parametrize(
    "path", ["shapes/stars/star_01.png", "unsorted/md_costea_bogdan_.png", "transportation/parking_romus_01.png"]
)
def test_unused_files_have_no_name(path: str) -> None:
    assert names.openclipart_name(PurePosixPath(path), {"star", "parking"}) is None


def test_emoji_names_drop_separators_and_repeats() -> None:
    entry = {"name": "DOG FACE", "short_names": ["dog", "dog"]}
    assert names.emoji_names(entry) == ["dog", "dog face"]


@pytest.mark.parametrize(
    ("name", "usable"),
    [("dog", True), ("office", False), ("black, person", False), ("tool", False), ("old car, vehicle", True)],
)
def test_generic_names_are_not_used(name: str, usable: bool) -> None:
    assert names.is_usable(name) is usable


def drawing(shift: int = 0) -> Image.Image:
    image = Image.new("RGBA", (200, 160), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20 + shift, 20, 120 + shift, 140), fill=(200, 40, 40, 255))
    draw.rectangle((90 + shift, 60, 180, 90), fill=(20, 20, 160, 255))
    draw.polygon([(30, 30), (10, 5), (70, 20)], fill=(10, 120, 10, 255))
    return image


def as_bytes(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_leak_filter_finds_resized_flattened_and_mirrored_copies(tmp_path: Path) -> None:
    framed = Image.new("RGB", (400, 400), "white")
    framed.paste(drawing().resize((250, 200)), (60, 90), drawing().resize((250, 200)))
    framed.save(tmp_path / "evaluation.webp", quality=80)
    other = Image.new("RGBA", (100, 100), (0, 0, 0, 255))
    ImageDraw.Draw(other).rectangle((0, 50, 40, 100), fill=(255, 255, 255, 255))
    candidates = leaks.Appearance.stack([leaks.Appearance.of(view) for view in (drawing(), ImageOps.mirror(drawing()), other)])
    reference = leaks.Appearance.of_folder(tmp_path)
    assert leaks.LeakRule(8, 0, 0, 0).matches(candidates, reference).tolist() == [True, True, False]
    assert leaks.LeakRule(-1, 14, 30, 0).matches(candidates, reference).tolist() == [True, True, False]
    assert leaks.LeakRule(-1, -1, 0, 16).matches(candidates, reference).tolist() == [True, True, False]
    assert not leaks.LeakRule(-1, -1, 0, 0).matches(candidates, reference).any()


def test_leak_filter_refuses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="leak filter"):
        leaks.Appearance.of_folder(tmp_path)


def test_duplicates_are_found_within_a_package_only() -> None:
    bits = np.stack([leaks.image_hashes(drawing(shift)) for shift in (0, 0, 0)])
    assert leaks.find_duplicates(bits, ["a", "a", "b"], 2).tolist() == [False, True, False]


def test_render_crops_centres_and_limits() -> None:
    pixels, _ = dataset.render(as_bytes(drawing()), 64, 2, 10**6, 16)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:2] == 255).all()
    assert (pixels[:, :2] == 255).all()
    assert (pixels.min(axis=(0, 2)) < 200).sum() >= 58
    assert dataset.render(as_bytes(drawing()), 64, 2, 100, 16) == "too many pixels"
    assert dataset.render(b"no image", 64, 2, 10**6, 16) == "cannot be decoded"
    assert dataset.render(as_bytes(Image.new("RGBA", (50, 50))), 64, 2, 10**6, 16) == "fully transparent"


def test_captions_name_the_sound_only_for_the_thing_itself() -> None:
    thing = dataset.Thing("animal", "dog", "a dog barking")
    near = dataset.captions(("dog", "dog face"), "emoji-datasource-google", thing, 1.0)
    far = dataset.captions(("poodle",), "emoji-datasource-google", thing, 0.7)
    assert near[0] == "dog"
    assert "a dog barking" in near
    assert "a dog barking" not in far
    assert "a drawing of a poodle" in far
