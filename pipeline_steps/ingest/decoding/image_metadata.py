"""Metadata of image files that decide about pixels, and copies of files without the metadata that do not."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

ORIENTATION = 274
"""Tag of EXIF and TIFF."""

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""Orientation -> operation that makes the image upright."""

MAX_ICC_BYTES = 16_000_000
"""Uncompressed bytes of a PNG's color profile and text chunks, above which they are ignored."""

_PNG_KEPT = {b"tRNS", b"eXIf", b"iCCP", b"acTL", b"fcTL", b"fdAT"}
_JPEG_KEPT = ((0xE0, b"JFIF\x00", 18), (0xEE, b"Adobe", 16), (0xE1, b"Exif\x00\x00", 18), (0xE2, b"ICC_PROFILE\x00", 19))
"""Marker, identifier and least length of application segments that matter for pixels."""

UNSUPPORTED_PROCESSES = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}
"""Frame headers of lossless, hierarchical and JPEG-LS coding, which may fail in the decoder."""

_SAME_COLOR = 2
"""Levels by which a profile named sRGB may differ from sRGB."""


def orientation_of(image: Image.Image) -> int | None:
    """Orientation 1 to 8 by EXIF or XMP; 1 if none is stated, None if the metadata cannot be read."""
    exif = image.info.get("exif") or b""
    try:
        value = image.getexif().get(ORIENTATION) or _orientation_entry(exif) or 1
    except MemoryError:
        raise
    except Exception:  # EXIF is a TIFF inside the file; the image is usable without it
        value = _orientation_entry(exif)
    return value if value is None or value in range(1, 9) else 1


def _orientation_entry(exif: bytes) -> int | None:
    """Orientation in the first directory of an EXIF block; other entries may be damaged."""
    start = 6 if exif[:6] == b"Exif\x00\x00" else 0
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(exif[start : start + 4])
    if order is None or len(exif) < start + 10:
        return None
    directory = start + struct.unpack_from(f"{order}I", exif, start + 4)[0]
    for entry in range(directory + 2, min(len(exif) - 11, directory + 2 + 12 * 512), 12):
        tag, kind, count, value = struct.unpack_from(f"{order}HHIH", exif, entry)
        if (tag, kind, count) == (ORIENTATION, 3, 1):
            return int(value)
    return None


class ColorProfile:
    """Embedded ICC profile. `space` is RGB, GRAY, CMYK or another color model."""

    def __init__(self, payload: bytes) -> None:
        self._profile = ImageCms.ImageCmsProfile(io.BytesIO(payload))
        self.space = str(self._profile.profile.xcolor_space).strip()

    def is_srgb(self) -> bool:
        """Whether the profile is named sRGB and its colors are those of sRGB."""
        if self.space != "RGB" or "sRGB" not in (self._profile.profile.profile_description or ""):
            return False
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
        converted = np.asarray(self.to_srgb(Image.fromarray(grid))).astype(int)
        return int(np.abs(converted - grid).max()) <= _SAME_COLOR

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """RGB image from one in the profile's color model (perceptual intent)."""
        converted = ImageCms.profileToProfile(image, self._profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        if converted is None:
            raise ValueError("the profile cannot be applied")
        return converted


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """RGB image from one in CIE L*a*b* (D50)."""
    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    if converted is None:
        raise ValueError("L*a*b* cannot be converted")
    return converted


def without_metadata(payload: bytes, form: str) -> bytes | None:
    """Copy of a PNG or JPEG without text, damaged ancillary chunks and application data; None if nothing can be removed."""
    copies = {"PNG": _png_without_metadata, "JPEG": _jpeg_without_metadata}
    stripped = copies[form](payload) if form in copies else None
    return None if stripped == payload else stripped


def _png_without_metadata(payload: bytes) -> bytes:
    kept = [payload[:8]]
    position = 8
    while position + 12 <= len(payload):
        size, name = struct.unpack_from(">I4s", payload, position)
        end = position + 12 + size
        chunk = payload[position:end]
        if not name[0] & 32 or (name in _PNG_KEPT and _is_intact(name, chunk, payload[25])):
            kept.append(chunk)
        position = end
    return b"".join(kept) + payload[position:]


def _is_intact(name: bytes, chunk: bytes, color_type: int) -> bool:
    """Whether the checksum and the size of an ancillary chunk are right and its profile is not too large."""
    size = {(b"tRNS", 0): 2, (b"tRNS", 2): 6, (b"acTL", color_type): 8}.get((name, color_type))
    if size is not None and len(chunk) != 12 + size:
        return False
    if struct.unpack(">I", chunk[-4:])[0] != zlib.crc32(chunk[4:-4]):
        return False
    if name != b"iCCP":
        return True
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(chunk[chunk.find(b"\x00", 8) + 2 : -4], MAX_ICC_BYTES)
    except zlib.error:
        return False
    return bool(profile) and unpacker.eof


def _jpeg_segments(payload: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, segment) from the start of a JPEG up to its first scan."""
    position = 2
    while position + 4 <= len(payload) and payload[position] == 0xFF and payload[position + 1] != 0xDA:
        end = position + 2 + int.from_bytes(payload[position + 2 : position + 4], "big")
        yield payload[position + 1], payload[position:end]
        position = end


def jpeg_process(payload: bytes) -> int | None:
    """Marker of the frame header, which names the coding process; None if there is no frame header."""
    processes = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
    return next((marker for marker, _ in _jpeg_segments(payload) if marker in processes), None)


def _jpeg_without_metadata(payload: bytes) -> bytes:
    """Copy without comments and application segments; JFIF, Adobe, EXIF and color profile are kept."""
    kept, position = [payload[:2]], 2
    for marker, segment in _jpeg_segments(payload):
        position += len(segment)
        useful = any(
            marker == kept_marker and segment.startswith(name, 4) and len(segment) >= least
            for kept_marker, name, least in _JPEG_KEPT
        )
        if useful or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
    return b"".join(kept) + payload[position:]
