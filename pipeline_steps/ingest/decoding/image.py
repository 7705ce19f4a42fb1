"""Image bytes to their normal form: RGB, upright, bounded size, over white, without metadata, PNG."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pipeline_steps.ingest.decoding.truncation import find_truncation
from pipeline_steps.ingest.reason_codes import RejectedItemError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that Pillow may open."""

_TRUNCATED = re.compile(r"truncat|unexpected end|not enough|premature|end of file", re.IGNORECASE)
_PIXELS = re.compile(r"\((\d+) pixels\)")
_DRAFT_MARGIN = 2
"""JPEG is decoded at a reduced scale at least this many times larger than the target, then filtered."""


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
    if truncation and form in {"WEBP", "BMP"}:  # their header contains the file size, so decoding is not needed
        raise RejectedItemError("IMG_TRUNCATED", f"{form}: {truncation.missing} bytes missing; {truncation.reason}")
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(payload), formats=(form,)) as image:
                return _normalize(image, form, limits)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = _PIXELS.search(str(error))  # Pillow's message names a limit twice as large
        size = count.group(1) if count else "too many"
        raise RejectedItemError("IMG_BOMB", f"{size} px, limit {limits.max_pixels} px") from error
    except (RejectedItemError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error, KeyError and others
        text = f"{type(error).__name__}: {error}"
        if truncation or _TRUNCATED.search(text):
            reason = f"{truncation.missing} or more bytes missing; {truncation.reason}" if truncation else "the data end early"
            raise RejectedItemError("IMG_TRUNCATED", f"{form}: {reason} ({text})") from error
        text = f"no readable {form} header" if isinstance(error, UnidentifiedImageError) else f"{form}: {text}"
        raise RejectedItemError("IMG_CORRUPT", text) from error


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
    image.load()
    profile = image.info.get("icc_profile")
    upright = _apply_orientation(image, normalizations)
    if (upright.width > upright.height) != (image.width > image.height):
        width, height = height, width
    small = _downscale(_to_eight_bit(upright, normalizations), limits.max_side)
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


def _apply_orientation(image: Image.Image, normalizations: set[str]) -> Image.Image:
    """Apply the EXIF orientation (tag 274)."""
    try:
        orientation = image.getexif().get(274, 1)
        upright = ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # EXIF is a TIFF inside the file; the image is usable without it
        normalizations.add("EXIF_IGNORED")
        return image
    if orientation not in range(2, 9) or upright is None:
        return image
    normalizations.add("ORIENTED")
    return upright


def _to_eight_bit(image: Image.Image, normalizations: set[str]) -> Image.Image:
    """Convert any pixel type to 8-bit RGB, RGBA or CMYK. 16-bit gray is divided by 257, which maps 65535 to 255."""
    mode = image.mode
    if mode.startswith("I;16"):
        gray = np.asarray(image, dtype=np.float32)
        normalizations.add("DEPTH_16")
        return Image.fromarray(np.rint(gray / 257.0).astype(np.uint8), "L").convert("RGB")
    if mode in {"I", "F"}:
        raise RejectedItemError("IMG_MODE", f"pixel type {mode} (32-bit samples) has no defined white; save it as 8 or 16 bit")
    if mode == "P":
        normalizations.add("PALETTE_TO_RGB")
    if mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        return image.convert("RGBA")
    if mode in {"RGB", "CMYK"}:
        return image
    return image.convert("RGB")


def _downscale(image: Image.Image, max_side: int) -> Image.Image:
    """Limit the longer side to `max_side` px by Lanczos after a box pre-reduction. RGBA is filtered premultiplied."""
    longest = max(image.size)
    if longest <= max_side:
        return image
    size = (max(1, round(image.width * max_side / longest)), max(1, round(image.height * max_side / longest)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _to_srgb(image: Image.Image, profile: bytes | None, normalizations: set[str]) -> Image.Image:
    """Convert to sRGB with the embedded ICC profile (perceptual intent); CMYK without a profile by the plain formula."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    color = image.convert("RGB") if alpha else image
    if color.mode == "CMYK":
        normalizations.add("CMYK_TO_RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = {"RGB": "RGB", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
            if space == color.mode and "sRGB" not in (source.profile.profile_description or ""):
                converted = ImageCms.profileToProfile(color, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                if converted is not None:
                    color = converted
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
