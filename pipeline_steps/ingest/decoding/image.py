"""Bytes of a picture -> its normal form: RGB, upright, bounded side, over white, no metadata, PNG."""

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
"""The only formats Pillow is allowed to try."""

_CUT = re.compile(r"truncat|unexpected end|not enough|premature|end of file", re.IGNORECASE)
_PIXELS = re.compile(r"\((\d+) pixels\)")
_DRAFT_MARGIN = 2
"""JPEG is decoded at a reduced scale that is still this many times larger than wanted, then filtered down."""


class ImageLimits(NamedTuple):
    """The `ingest.picture` parameters that shape the result, plain so that they travel to a child process."""

    side: int
    min_side: int
    max_aspect: float
    max_pixels: int
    animated: str


def normalise_picture(payload: bytes, form: str, limits: ImageLimits) -> dict[str, Any]:
    """Decode one picture.

    Args:
        payload: the raw file.
        form: format by signature; Pillow is allowed this one alone.
        limits: bounds and the wanted side in pixels.

    Returns:
        payload (PNG bytes), format, width, height (of the upright original), frames, phash (16 hex digits), repaired.

    Raises:
        RejectedError: with one of the IMG codes.
        MemoryError: the process limit was reached.
    """
    missing = find_truncation(io.BytesIO(payload), form)
    if missing and form in {"WEBP", "BMP"}:  # their whole size stands in the header: nothing need be decoded to know
        raise RejectedItemError("IMG_TRUNCATED", f"{form}: {missing.missing} bytes missing; {missing.text}")
    Image.MAX_IMAGE_PIXELS = limits.max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(payload), formats=(form,)) as picture:
                return _normalise(picture, form, limits)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        count = _PIXELS.search(str(error))  # Pillow's text names twice the limit, from which it raises by itself
        size = count.group(1) if count else "too many"
        raise RejectedItemError("IMG_BOMB", f"{size} px, limit {limits.max_pixels} px") from error
    except RejectedItemError:
        raise
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        if missing:
            raise RejectedItemError("IMG_TRUNCATED", f"{form}: {missing.missing} bytes missing; {missing.text}") from error
        raise RejectedItemError("IMG_CORRUPT", f"no readable {form} header") from error
    except Exception as error:  # Pillow's plugins raise whatever they meet: OSError, SyntaxError, struct.error, KeyError...
        text = f"{type(error).__name__}: {error}"
        if missing or _CUT.search(text):
            lack = f"{missing.missing} or more bytes missing; {missing.text}" if missing else "the data end early"
            raise RejectedItemError("IMG_TRUNCATED", f"{form}: {lack} ({text})") from error
        raise RejectedItemError("IMG_CORRUPT", f"{form}: {text}") from error


def _normalise(picture: Image.Image, form: str, limits: ImageLimits) -> dict[str, Any]:
    width, height = picture.size
    if width * height > limits.max_pixels:
        raise RejectedItemError("IMG_BOMB", f"{width} x {height} px, limit {limits.max_pixels} px")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise RejectedItemError("IMG_ASPECT", f"{width} x {height} px, limit {limits.max_aspect:g} : 1")
    if min(width, height) < limits.min_side:
        raise RejectedItemError("IMG_TOO_SMALL", f"{width} x {height} px, shorter side below {limits.min_side}")
    repaired: set[str] = set()
    frames = int(getattr(picture, "n_frames", 1))
    if frames > 1:
        if limits.animated == "refuse":
            raise RejectedItemError("IMG_ANIMATED", f"{frames} frames, and picture.animated is 'refuse'")
        repaired.add("FIRST_FRAME")
        picture.seek(0)
    if form == "JPEG":
        picture.draft(None, (limits.side * _DRAFT_MARGIN, limits.side * _DRAFT_MARGIN))
    picture.load()
    profile = picture.info.get("icc_profile")
    turned = _upright(picture, repaired)
    if (turned.width > turned.height) != (picture.width > picture.height):
        width, height = height, width
    small = _shrink(_to_eight_bit(turned, repaired), limits.side)
    flat = _over_white(_to_srgb(small, profile, repaired), repaired)
    return {
        "payload": _encode(flat),
        "format": form,
        "width": width,
        "height": height,
        "num_frames": frames,
        "phash": perceptual_hash(flat),
        "normalizations": sorted(repaired),
    }


def _upright(picture: Image.Image, repaired: set[str]) -> Image.Image:
    """Apply the EXIF orientation (tag 274)."""
    try:
        orientation = picture.getexif().get(274, 1)
        turned = ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # EXIF is a TIFF inside the file; a broken one is no reason to lose the picture
        repaired.add("EXIF_IGNORED")
        return picture
    if orientation not in range(2, 9) or turned is None:
        return picture
    repaired.add("ORIENTED")
    return turned


def _to_eight_bit(picture: Image.Image, repaired: set[str]) -> Image.Image:
    """Any pixel type -> RGB, RGBA or CMYK with 8 bits. 16-bit grey is divided by 257, which takes 65535 to 255."""
    mode = picture.mode
    if mode.startswith("I;16"):
        grey = np.asarray(picture, dtype=np.float32)
        repaired.add("DEPTH_16")
        return Image.fromarray(np.rint(grey / 257.0).astype(np.uint8), "L").convert("RGB")
    if mode in {"I", "F"}:
        raise RejectedItemError("IMG_MODE", f"pixel type {mode} (32-bit samples) has no stated white; save it as 8 or 16 bit")
    if mode == "P":
        repaired.add("PALETTE_TO_RGB")
    if mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in picture.info:
        return picture.convert("RGBA")
    if mode in {"RGB", "CMYK"}:
        return picture
    return picture.convert("RGB")


def _shrink(picture: Image.Image, side: int) -> Image.Image:
    """Longer side at most `side` px, Lanczos after a box pre-reduction; never enlarged. RGBA is filtered premultiplied."""
    longest = max(picture.size)
    if longest <= side:
        return picture
    size = (max(1, round(picture.width * side / longest)), max(1, round(picture.height * side / longest)))
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def _to_srgb(picture: Image.Image, profile: bytes | None, repaired: set[str]) -> Image.Image:
    """Colours through the embedded ICC profile to sRGB (perceptual); CMYK without one by the plain formula."""
    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    colour = picture.convert("RGB") if alpha else picture
    if colour.mode == "CMYK":
        repaired.add("CMYK_TO_RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = {"RGB": "RGB", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
            if space == colour.mode and "sRGB" not in (source.profile.profile_description or ""):
                converted = ImageCms.profileToProfile(colour, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                if converted is not None:
                    colour = converted
                    repaired.add("ICC_APPLIED")
        except MemoryError:
            raise
        except Exception:  # a broken profile costs the colours their last accuracy, not the picture
            repaired.add("ICC_IGNORED")
    colour = colour.convert("RGB")
    if alpha:
        colour.putalpha(alpha)
    return colour


def _over_white(picture: Image.Image, repaired: set[str]) -> Image.Image:
    if picture.mode != "RGBA":
        return picture
    if np.asarray(picture.getchannel("A")).min() == 255:
        return picture.convert("RGB")
    repaired.add("ALPHA_OVER_WHITE")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _encode(picture: Image.Image) -> bytes:
    """PNG of the pixels alone: built from an array, so that no EXIF, profile, comment or place travels along.

    Compression level 3 of zlib takes 3.5 ms a picture of 256 px, level 6 takes 7.9 ms and saves 5 % of the bytes.
    """
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def perceptual_hash(picture: Image.Image) -> str:
    """64-bit DCT hash (imagehash.phash) as 16 hex digits."""
    import imagehash

    return str(imagehash.phash(picture))
