"""Image bytes to their normal form: RGB, upright, bounded size, over white, without metadata, PNG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, PngImagePlugin, UnidentifiedImageError

from pipeline_steps.ingest.decoding.image_metadata import (
    MAX_ICC_BYTES,
    ORIENTATION,
    TRANSPOSITIONS,
    UNSUPPORTED_PROCESSES,
    ColorProfile,
    jpeg_process,
    lab_to_srgb,
    orientation_of,
    without_metadata,
)
from pipeline_steps.ingest.decoding.packed_tiff import open_packed_tiff
from pipeline_steps.ingest.decoding.truncation import Truncation, find_truncation
from pipeline_steps.ingest.reason_codes import RejectedItemError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that Pillow may open."""

_TRUNCATED = re.compile(r"truncat|unexpected end|not enough|premature|end of file", re.IGNORECASE)
_UNSUPPORTED = re.compile(
    r"unknown (pixel|raw) mode|SyntaxError: \d+$|unsupported|not supported|cannot handle|not available|unknown compression",
    re.IGNORECASE,
)
_PIXELS = re.compile(r"\((\d+) pixels\)")
_DRAFT_MARGIN = 2
"""JPEG is decoded at a reduced scale at least this many times larger than the target, then filtered."""


_BITS_PER_SAMPLE, _COMPRESSION, _PHOTOMETRIC, _MAX_SAMPLE_VALUE, _PLANES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = (
    258, 259, 262, 281, 284, 338, 339,
)  # fmt: skip
"""Tags of TIFF."""

_TIFF_COMPRESSIONS = {1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000}
"""None, CCITT, LZW, JPEG, Deflate, PackBits, LZMA, Zstandard."""


class ImageLimits(NamedTuple):
    """Parameters of `ingest.image` that affect the result, in the form that is sent to a worker."""

    max_side: int
    min_side: int
    max_aspect: float
    max_pixels: int
    animated: str


def normalize_image(payload: bytes, form: str, limits: ImageLimits) -> dict[str, Any]:
    """Decode one image.

    Args:
        payload: the raw file.
        form: format by signature; Pillow may open no other.
        limits: of the original, and the longer side of the result.

    Returns:
        payload (PNG bytes), format, width, height (of the upright original), num_frames, phash (16 hex digits), normalizations.

    Raises:
        RejectedItemError: with one of the IMG codes.
        MemoryError: the process limit was reached.
    """
    truncation = find_truncation(io.BytesIO(payload), form)
    if truncation and form == "WEBP":  # the header contains the file size, so decoding is not needed
        raise RejectedItemError("IMG_TRUNCATED", f"{form}: {truncation.missing} bytes missing; {truncation.reason}")
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    PngImagePlugin.MAX_TEXT_CHUNK = MAX_ICC_BYTES
    try:
        try:
            return _open(payload, form, limits)
        except _DECIDED:
            raise
        except Exception:
            stripped = without_metadata(payload, form)
            if stripped is None:
                raise
            row = _open(stripped, form, limits)
            return {**row, "normalizations": sorted({*row["normalizations"], "METADATA_IGNORED"})}
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = _PIXELS.search(str(error))  # Pillow's message names a limit twice as large
        size = count.group(1) if count else "too many"
        raise RejectedItemError("IMG_BOMB", f"{size} px, limit {limits.max_pixels} px") from error
    except (RejectedItemError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, KeyError and others
        raise _rejection(_cause(error, payload, form), payload, form, truncation) from error


_DECIDED = (RejectedItemError, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def _open(payload: bytes, form: str, limits: ImageLimits) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(payload), formats=(form,))
        except UnidentifiedImageError:
            packed = open_packed_tiff(payload, limits.max_pixels) if form == "TIFF" else None
            if packed is None:
                raise
            row = _normalize(packed, form, limits)
            return {**row, "normalizations": sorted({*row["normalizations"], "DEPTH_16"})}
        with image:
            return _normalize(image, form, limits)


def _cause(error: Exception, payload: bytes, form: str) -> Exception:
    """Error of the format's plugin, which `Image.open` replaces by "cannot identify"."""
    if isinstance(error, UnidentifiedImageError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.OPEN[form][0](io.BytesIO(payload), "")
        except Exception as cause:
            return cause
    return error


def _rejection(error: Exception, payload: bytes, form: str, truncation: Truncation | None) -> RejectedItemError:
    """Rejection for an error of Pillow: an unsupported variant of a format is not damage."""
    text = f"{type(error).__name__}: {error}"
    if truncation or _TRUNCATED.search(text):
        reason = (
            f"{truncation.missing} or more bytes missing; {truncation.reason}" if truncation else "bytes are missing at the end"
        )
        return RejectedItemError("IMG_TRUNCATED", f"{form}: {reason} ({text})")
    if form == "JPEG" and jpeg_process(payload) in UNSUPPORTED_PROCESSES:
        text = "unsupported coding process"
    if _UNSUPPORTED.search(text):
        return RejectedItemError("FORMAT_NOT_ALLOWED", f"this kind of {form} is not supported ({text}); convert it to PNG")
    return RejectedItemError("IMG_CORRUPT", f"{form}: {text}")


def _normalize(image: Image.Image, form: str, limits: ImageLimits) -> dict[str, Any]:
    """Check the limits, normalize and measure an opened image."""
    width, height = image.size
    if width * height > limits.max_pixels:
        raise RejectedItemError("IMG_BOMB", f"{width} x {height} px, limit {limits.max_pixels} px")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise RejectedItemError("IMG_ASPECT", f"{width} x {height} px, limit {limits.max_aspect:g} : 1")
    if min(width, height) < limits.min_side:
        raise RejectedItemError("IMG_TOO_SMALL", f"{width} x {height} px, shorter side below {limits.min_side}")
    normalizations: set[str] = set()
    frames = int(getattr(image, "n_frames", 1))
    if frames > 1:
        if limits.animated == "refuse":
            raise RejectedItemError("IMG_ANIMATED", f"{frames} frames, and ingest.image.animated is 'refuse'")
        normalizations.add("FIRST_FRAME")
        image.seek(0)
    if form == "JPEG":
        image.draft(None, (limits.max_side * _DRAFT_MARGIN, limits.max_side * _DRAFT_MARGIN))
    tags = dict(getattr(image, "tag_v2", {}))  # of a TIFF; loading applies and removes the orientation
    if form == "TIFF":
        _check_tiff(tags)
    image.load()
    if form == "TIFF":
        width, height = image.size
    profile = _color_profile(image, normalizations)
    upright, turned = _apply_orientation(image, tags.get(ORIENTATION, 1), normalizations)
    if turned:
        width, height = height, width
    keep_gray = profile is not None and profile.space == "GRAY"
    plain = _to_eight_bit(upright, form, tags, keep_gray, normalizations)
    # Writers of BMP and TIFF leave the bytes of an alpha channel that they do not use at 0.
    may_be_unused = form == "BMP" or (form == "TIFF" and 1 not in np.atleast_1d(tags.get(_EXTRA_SAMPLES, 0)))
    small = _downscale(_check_alpha(plain, may_be_unused, normalizations), limits.max_side)
    flat = _over_white(_to_srgb(small, profile, normalizations), normalizations)
    return {
        "payload": _encode(flat),
        "format": form,
        "width": width,
        "height": height,
        "num_frames": frames,
        "phash": perceptual_hash(flat),
        "normalizations": sorted(normalizations),
    }


def _apply_orientation(image: Image.Image, applied: int, normalizations: set[str]) -> tuple[Image.Image, bool]:
    """Upright image, and whether that exchanged width and height. `applied` is the orientation that loading applied."""
    orientation = orientation_of(image)
    if orientation is None:
        normalizations.add("EXIF_IGNORED")
        return image, False
    if orientation > 1 or applied in TRANSPOSITIONS:
        normalizations.add("ORIENTED")
    if orientation == 1:
        return image, False
    return image.transpose(TRANSPOSITIONS[orientation]), orientation >= 5


def _color_profile(image: Image.Image, normalizations: set[str]) -> ColorProfile | None:
    payload = image.info.get("icc_profile")
    if not payload:
        return None
    try:
        return ColorProfile(payload)
    except MemoryError:
        raise
    except Exception:  # the colors are less accurate without the profile, but usable
        normalizations.add("ICC_IGNORED")
        return None


def _check_tiff(tags: Mapping[int, Any]) -> None:
    """Reject kinds of TIFF that Pillow opens and decodes wrongly or not at all."""
    compression, bits = tags.get(_COMPRESSION, 1), int(np.max(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 1))))
    if compression not in _TIFF_COMPRESSIONS:
        kind = f"compression {compression}"
    elif tags.get(_PHOTOMETRIC) == 6 and compression not in {6, 7}:
        kind = "YCbCr without JPEG compression"
    elif tags.get(_PLANES) == 2 and bits > 8 and compression == 1:
        kind = f"{bits}-bit samples in separate planes"
    else:
        return
    raise RejectedItemError("FORMAT_NOT_ALLOWED", f"TIFF with {kind} is not supported; convert it to PNG")


def _to_eight_bit(
    image: Image.Image, form: str, tags: Mapping[int, Any], keep_gray: bool, normalizations: set[str]
) -> Image.Image:
    """Convert any pixel type to 8-bit RGB, RGBA or CMYK; to L or LA if `keep_gray` is set and the image is gray.

    Args:
        image: decoded and upright.
        form: format of the file.
        tags: of a TIFF; empty otherwise.
        keep_gray: the color profile is one for gray values.
        normalizations: receives the codes of the conversions.
    """
    mode = image.mode
    if 2 in np.atleast_1d(tags.get(_SAMPLE_FORMAT, 1)):
        raise RejectedItemError("IMG_MODE", "signed samples have no defined black; save it as unsigned 8 or 16 bit")
    if mode.startswith("I;16"):
        normalizations.add("DEPTH_16")
        image = _sixteen_to_eight(image, tags)
        mode = image.mode
    if mode in {"I", "F"}:
        raise RejectedItemError("IMG_MODE", f"pixel type {mode} (32-bit samples) has no defined white; save it as 8 or 16 bit")
    if mode == "LAB":
        return lab_to_srgb(image)
    if mode == "P":
        normalizations.add("PALETTE_TO_RGB")
    if mode == "CMYK" and form == "JPEG" and "adobe" not in image.info:
        # Pillow inverts every CMYK JPEG. Only files with Adobe's marker are stored inverted; without it 0 means no ink.
        normalizations.add("CMYK_ASSUMED")
        return ImageChops.invert(image)
    if mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        return image.convert("LA" if keep_gray and mode in {"L", "LA", "La", "1"} else "RGBA")
    if mode in {"RGB", "CMYK"}:
        return image
    return image.convert("L" if keep_gray and mode in {"L", "1"} else "RGB")


def _sixteen_to_eight(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """8-bit gray of samples of up to 16 bit. White is the largest value of the stated depth, 65535 by default.

    Pillow neither scales samples of 12 bit nor inverts 16-bit samples whose 0 is white.
    """
    gray = np.asarray(image, dtype=np.float32)
    white = float(2 ** int(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 16))[0]) - 1)
    stated = int(np.atleast_1d(tags.get(_MAX_SAMPLE_VALUE, 0))[0])
    if stated + 1 in {1 << bits for bits in range(9, 16)} and gray.max() <= stated:
        white = float(stated)
    if tags.get(_PHOTOMETRIC, 1) == 0:
        gray = white - gray
    scaled = Image.fromarray(np.rint(gray * np.float32(255.0 / white) if white != 65535.0 else gray / 257.0).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled.putalpha(Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _check_alpha(image: Image.Image, may_be_unused: bool, normalizations: set[str]) -> Image.Image:
    """Remove an alpha channel of zeros if it may be unused.

    Raises:
        RejectedItemError: IMG_TRANSPARENT for another image without a visible pixel.
    """
    if image.mode not in {"RGBA", "LA"} or np.asarray(image.getchannel("A")).max() > 0:
        return image
    if not may_be_unused:
        raise RejectedItemError("IMG_TRANSPARENT", "every pixel is transparent")
    normalizations.add("ALPHA_IGNORED")
    return image.convert(image.mode.removesuffix("A"))


def _downscale(image: Image.Image, max_side: int) -> Image.Image:
    """Limit the longer side to `max_side` px by Lanczos after a box pre-reduction. RGBA is filtered premultiplied."""
    longest = max(image.size)
    if longest <= max_side:
        return image
    size = (max(1, round(image.width * max_side / longest)), max(1, round(image.height * max_side / longest)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _to_srgb(image: Image.Image, profile: ColorProfile | None, normalizations: set[str]) -> Image.Image:
    """Convert to sRGB with the embedded ICC profile; CMYK without a profile by the plain formula."""
    alpha = image.getchannel("A") if image.mode in {"RGBA", "LA"} else None
    color = image.convert(image.mode.removesuffix("A")) if alpha else image
    if color.mode == "CMYK":
        normalizations.add("CMYK_TO_RGB")
    if profile:
        try:
            if {"GRAY": "L"}.get(profile.space, profile.space) != color.mode:
                normalizations.add("ICC_IGNORED")
            elif not profile.is_srgb():
                color = profile.to_srgb(color)
                normalizations.add("ICC_APPLIED")
        except MemoryError:
            raise
        except Exception:  # the colors are less accurate without the profile, but usable
            normalizations.add("ICC_IGNORED")
    color = color.convert("RGB")
    if alpha:
        color.putalpha(alpha)
    return color


def _over_white(image: Image.Image, normalizations: set[str]) -> Image.Image:
    """Composite transparent images over white."""
    if image.mode != "RGBA":
        return image
    if np.asarray(image.getchannel("A")).min() == 255:
        return image.convert("RGB")
    normalizations.add("ALPHA_OVER_WHITE")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _encode(image: Image.Image) -> bytes:
    """PNG of the pixels only: built from an array, so that EXIF, profile, comments and location are dropped."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG", compress_level=3)  # faster than the default, nearly the same size
    return buffer.getvalue()


def perceptual_hash(image: Image.Image) -> str:
    """64-bit DCT hash (imagehash.phash) as 16 hex digits."""
    import imagehash

    return str(imagehash.phash(image))
