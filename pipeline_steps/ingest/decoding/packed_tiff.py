"""Uncompressed TIFF with samples of 10, 12, 14 or 16 bit that Pillow does not open: packed bits, 12-bit color, white as 0."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from pipeline_steps.ingest.reason_codes import RejectedItemError

ORIENTATION, ICC_PROFILE = 274, 34675
_ROWS = 64
"""Rows that are unpacked at once."""


def open_packed_tiff(payload: bytes, max_pixels: int) -> Image.Image | None:
    """8-bit image of the first page with its color profile and orientation, or None for another kind of TIFF.

    Raises:
        RejectedItemError: IMG_BOMB or IMG_TRUNCATED.
        Exception: the directory is damaged.
    """
    file = io.BytesIO(payload)
    directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(directory.next)
    directory.load(file)
    width, height = int(directory[256]), int(directory[257])
    channels = int(directory.get(277, 1))
    depths = set(np.atleast_1d(directory.get(258, 1)).tolist())
    wanted = {0: 1, 1: 1, 2: 3}.get(directory.get(262, -1)) == channels
    plain = (directory.get(259, 1), directory.get(284, 1), directory.get(266, 1)) == (1, 1, 1) and 273 in directory
    if not (wanted and plain and len(depths) == 1 and depths <= {10, 12, 14, 16}) or {*_values(directory, 339)} - {1}:
        return None
    if width * height > max_pixels:
        raise RejectedItemError("IMG_BOMB", f"{width} x {height} px, limit {max_pixels} px")
    bits = int(depths.pop())
    if bits == 16 and payload[:2] == b"II":
        return None  # the unpacking below reads the most significant bit first
    data = b"".join(
        payload[start : start + size] for start, size in zip(_values(directory, 273), _values(directory, 279), strict=True)
    )
    row_bytes = (width * channels * bits + 7) // 8
    if len(data) < row_bytes * height:
        raise RejectedItemError("IMG_TRUNCATED", f"TIFF: {row_bytes * height - len(data)} bytes of samples are missing")
    rows = np.frombuffer(data, np.uint8, row_bytes * height).reshape(height, row_bytes)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.float32) * np.float32(255.0 / ((1 << bits) - 1))
    pixels = np.empty((height, width * channels), np.uint8)
    for top in range(0, height, _ROWS):
        unpacked = np.unpackbits(rows[top : top + _ROWS], axis=1, count=width * channels * bits)
        pixels[top : top + _ROWS] = np.rint(unpacked.reshape(len(unpacked), -1, bits) @ weights)
    if directory.get(262) == 0:
        pixels = 255 - pixels
    image = Image.fromarray(pixels.reshape(height, width, channels) if channels == 3 else pixels)
    if profile := directory.get(ICC_PROFILE):
        image.info["icc_profile"] = bytes(profile)
    image.getexif()[ORIENTATION] = int(directory.get(ORIENTATION, 1))
    return image


def _values(directory: Any, tag: int) -> list[int]:
    """Numbers of a tag; an empty list if it is missing."""
    return [int(value) for value in np.atleast_1d(directory[tag])] if tag in directory else []
