"""Odd images show the pixels that they encode, or are refused for the reason that is true."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline_steps.ingest.decoding.image import ImageLimits, normalize_image
from pipeline_steps.ingest.file_signatures import check_format, read_head
from pipeline_steps.ingest.reason_codes import RejectedItemError
from tests.factories import odd_images
from tests.factories.image_files import encode, exif, gradient, icc, with_segment
from tests.factories.odd_images import OddImage

LIMITS = ImageLimits(max_side=256, min_side=16, max_aspect=10, max_pixels=50_000_000, animated="first")


def normalized(name: str, payload: bytes) -> dict:
    _, form = check_format(name, read_head(io.BytesIO(payload)), len(payload))
    return normalize_image(payload, form, LIMITS)


def stored(row: dict) -> np.ndarray:
    with Image.open(io.BytesIO(row["payload"])) as image:
        return np.asarray(image).astype(float)


@pytest.mark.parametrize("case", odd_images.CASES, ids=lambda case: case.name)
def test_odd_image(case: OddImage) -> None:
    payload = case.build()
    if case.pixels is None:
        with pytest.raises(RejectedItemError) as error:
            normalized(case.name, payload)
        assert error.value.code == case.code, error.value
        return
    row = normalized(case.name, payload)
    pixels, truth = stored(row), np.asarray(case.pixels(), dtype=float)
    truth = np.repeat(truth[..., None], 3, 2) if truth.ndim == 2 else truth
    assert pixels.shape == truth.shape
    assert (row["height"], row["width"]) == truth.shape[:2]
    assert np.abs(pixels.mean((0, 1)) - truth.mean((0, 1))).max() <= 2
    assert abs(pixels.max() - truth.max()) <= 2
    assert np.median(np.abs(pixels - truth)) <= 2
    assert set(row["normalizations"]) == case.marks


def test_names_are_unique() -> None:
    names = [case.name for case in odd_images.CASES]
    assert len(names) == len(set(names))
    assert len(names) > 100


COMPARABLE = [
    case
    for case in odd_images.CASES
    if case.pixels and not case.marks and not case.name.startswith(("lab", "declares-1", "declares-4"))
]
"""Files that need no conversion. imagecodecs refuses a BMP with a wrong size; tifffile does not convert L*a*b*."""


@pytest.mark.parametrize("case", COMPARABLE, ids=lambda case: case.name)
def test_pixels_agree_with_an_independent_decoder(case: OddImage) -> None:
    payload = case.build()
    if case.name.endswith(("tif", "tiff")):
        other = tifffile.imread(io.BytesIO(payload))
        with tifffile.TiffFile(io.BytesIO(payload)) as file:
            page = file.pages[0]
            other = 2**page.bitspersample - 1 - other if page.photometric == 0 else other
            other = np.moveaxis(other, 0, -1) if other.ndim == 3 and page.planarconfig == 2 else other
            other = other[..., :3] if other.ndim == 3 else other
            other = other / (2**page.bitspersample - 1) * 255
    else:
        other = imagecodecs.imread(io.BytesIO(payload)).astype(float)
        other = other / 257 if other.max() > 255 else other
    pixels = stored(normalized(case.name, payload))
    expected = np.repeat(other[..., None], 3, 2) if other.ndim == 2 else other
    assert np.abs(pixels.mean((0, 1)) - expected.mean((0, 1))).max() <= 2
    assert abs(pixels.max() - expected.max()) <= 2


DEEP = [case for case in odd_images.CASES if case.marks == {"DEPTH_16"} and case.name.startswith(("gray-1", "color-1"))]


@pytest.mark.parametrize(
    "case", [case for case in DEEP if "-in-" not in case.name and "png" not in case.name], ids=lambda case: case.name
)
def test_deep_samples_agree_with_tifffile(case: OddImage) -> None:
    payload = case.build()
    with tifffile.TiffFile(io.BytesIO(payload)) as file:
        page = file.pages[0]
        other = page.asarray() / (2**page.bitspersample - 1) * 255
        other = 255 - other if page.photometric == 0 else other
    pixels = stored(normalized(case.name, payload))
    assert np.abs(pixels - (other if other.ndim == 3 else other[..., None])).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_of_a_turned_image_at_reduced_scale(orientation: int) -> None:
    """At an eighth of its scale a nearly square JPEG is square; the orientation decides which side is which."""
    payload = with_segment(encode(gradient(2400, 2399), "JPEG"), 0xE1, exif(orientation))
    row = normalized("x.jpg", payload)
    assert (row["width"], row["height"]) == ((2399, 2400) if orientation >= 5 else (2400, 2399))


def test_gray_profile_is_applied_as_lcms_does_in_another_library() -> None:
    profile = icc("GRAY", 1.4)
    other = imagecodecs.cms_transform(
        odd_images.GRAY[..., None], profile, imagecodecs.cms_profile("srgb"), colorspace="gray", outcolorspace="rgb"
    )
    pixels = stored(normalized("x.png", encode(odd_images.GRAY, "PNG", icc_profile=profile)))
    assert np.abs(pixels - other.reshape(pixels.shape)).max() <= 1
