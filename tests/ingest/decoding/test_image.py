from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline_steps.ingest.decoding.image import ImageLimits, normalize_image
from pipeline_steps.ingest.reason_codes import RejectedItemError

LIMITS = ImageLimits(max_side=64, min_side=8, max_aspect=10, max_pixels=1_000_000, animated="first")


def smooth(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, np.full_like(x, 90)], -1).astype(np.uint8)


def encoded(array: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def pixels(row: dict) -> np.ndarray:
    with Image.open(io.BytesIO(row["payload"])) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        assert not image.info
        return np.asarray(image)


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 300), st.integers(8, 300))
def test_max_side_is_never_enlarged(width: int, height: int) -> None:
    limits = LIMITS._replace(max_aspect=100)
    row = normalize_image(encoded(smooth(width, height)), "PNG", limits)
    result = pixels(row)
    assert max(result.shape[:2]) == min(64, max(width, height))
    assert (row["width"], row["height"]) == (width, height)
    if max(width, height) <= 64:
        assert np.array_equal(result, smooth(width, height))


def test_downscaling_does_not_alias() -> None:
    """A one-pixel checkerboard must become gray; nearest-neighbor or undersized filters would alias."""
    board = ((np.indices((512, 512)).sum(0) % 2) * 255).astype(np.uint8)
    result = pixels(normalize_image(encoded(np.repeat(board[..., None], 3, 2)), "PNG", LIMITS))
    assert np.abs(result.astype(int) - 127).max() <= 3


def test_reduced_jpeg_decoding_matches_full_decoding() -> None:
    array = smooth(1200, 800)
    reduced = pixels(normalize_image(encoded(array, "JPEG", quality=95), "JPEG", LIMITS)).astype(int)
    full = np.asarray(Image.fromarray(array).resize((64, 43), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(reduced - full).mean() < 1.5


def test_transparent_colors_do_not_bleed_when_downscaled() -> None:
    array = np.zeros((256, 256, 4), np.uint8)
    array[..., 0] = 255  # fully transparent red on the left, opaque blue on the right
    array[:, 128:] = (0, 0, 255, 255)
    result = pixels(normalize_image(encoded(array), "PNG", LIMITS)).astype(int)
    assert np.array_equal(result[10, 5], [255, 255, 255])
    assert np.array_equal(result[10, 60], [0, 0, 255])
    assert (result[..., 0] <= result[..., 2]).all(), "no red may appear"


def test_opaque_alpha_is_no_normalization() -> None:
    array = np.dstack([smooth(20, 20), np.full((20, 20), 255, np.uint8)])
    row = normalize_image(encoded(array), "PNG", LIMITS)
    assert row["normalizations"] == []
    assert np.array_equal(pixels(row), smooth(20, 20))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    array = smooth(60, 40)
    row = normalize_image(encoded(array, "PNG", exif=exif.tobytes()), "PNG", LIMITS)
    turns = {1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.swapaxes(0, 1),
             6: np.rot90(array, -1), 7: np.rot90(array.swapaxes(0, 1), 2), 8: np.rot90(array)}  # fmt: skip
    assert np.array_equal(pixels(row), turns[orientation])
    assert (row["height"], row["width"]) == turns[orientation].shape[:2]
    assert ("ORIENTED" in row["normalizations"]) == (orientation > 1)


def test_embedded_profile_is_applied() -> None:
    """The bytes of sRGB under another description are a profile that must be applied, with an equal result."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    renamed = plain.replace("sRGB".encode("utf-16-be"), "xxxx".encode("utf-16-be"))
    assert renamed != plain
    row = normalize_image(encoded(smooth(40, 40), icc_profile=renamed), "PNG", LIMITS)
    assert row["normalizations"] == ["ICC_APPLIED"]
    assert np.abs(pixels(row).astype(int) - smooth(40, 40)).max() <= 1
    assert normalize_image(encoded(smooth(40, 40), icc_profile=plain), "PNG", LIMITS)["normalizations"] == []


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (smooth(7, 20), "IMG_TOO_SMALL"),
        (smooth(200, 15), "IMG_ASPECT"),
        (smooth(1001, 1000), "IMG_BOMB"),
        (np.zeros((1500, 1500, 3), np.uint8), "IMG_BOMB"),
    ],
)
def test_limits(array: np.ndarray, code: str) -> None:
    with pytest.raises(RejectedItemError) as error:
        normalize_image(encoded(array), "PNG", LIMITS)
    assert error.value.code == code


def test_32_bit_samples_are_rejected() -> None:
    with pytest.raises(RejectedItemError) as error:
        normalize_image(encoded(np.full((20, 20), 0.5, np.float32), "TIFF"), "TIFF", LIMITS)
    assert error.value.code == "IMG_MODE"


def test_animated_refuse() -> None:
    buffer = io.BytesIO()
    frames = [Image.fromarray(smooth(20, 20 + step)).resize((20, 20)) for step in range(3)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(RejectedItemError) as error:
        normalize_image(buffer.getvalue(), "GIF", LIMITS._replace(animated="refuse"))
    assert error.value.code == "IMG_ANIMATED"


def test_pillow_opens_only_the_format_of_the_signature() -> None:
    """The bytes of a PCX under the signature of a PNG must not reach Pillow's PCX plugin."""
    with pytest.raises(RejectedItemError) as error:
        normalize_image(b"\x0a\x05\x01\x08" + bytes(200), "PNG", LIMITS)
    assert error.value.code in {"IMG_CORRUPT", "IMG_TRUNCATED"}


def test_golden_output() -> None:
    """Raise decode.VERSION when this changes; otherwise the cache returns the old form."""
    from pipeline_steps.ingest.decoding.decode import VERSION

    row = normalize_image(encoded(smooth(300, 200)), "PNG", LIMITS)
    result = pixels(row)
    assert (VERSION, row["phash"], int(result.astype(np.int64).sum()), result.shape) == (
        2,
        GOLDEN_HASH,
        GOLDEN_SUM,
        (43, 64, 3),
    )


GOLDEN_HASH = "884712667953ed67"
GOLDEN_SUM = 943949
