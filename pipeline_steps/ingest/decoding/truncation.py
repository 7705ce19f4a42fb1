"""Detection of truncated images by the lengths in their structure.

Only headers are read. No declared size is allocated, and every step moves forward.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from pipeline_steps.core.safe_paths import file_size


class Truncation(NamedTuple):
    """Number of bytes missing from a file, and how that shows."""

    missing: int
    reason: str


def find_truncation(handle: BinaryIO, form: str) -> Truncation | None:
    """Find out whether a WEBP, PNG, GIF or JPEG file is truncated; None if it is complete.

    The position of `handle` is 0 afterwards.
    """
    checks: dict[str, Callable[[BinaryIO, str], Truncation | None]] = {
        "WEBP": _declared_size, "PNG": _png, "JPEG": _end_marker, "GIF": _end_marker,
    }  # fmt: skip
    if form not in checks:
        return None
    handle.seek(0)
    try:
        return checks[form](handle, form)
    finally:
        handle.seek(0)


def _declared_size(handle: BinaryIO, form: str) -> Truncation | None:
    """WEBP: compare the size that the header declares with the file."""
    size = file_size(handle)
    field = handle.read(12)[4:8]
    declared = int.from_bytes(field, "little") + 8 if len(field) == 4 else 0
    if declared > size:
        return Truncation(declared - size, f"the header declares {declared} bytes, {size} are present")
    return None


def _png(handle: BinaryIO, form: str) -> Truncation | None:
    """PNG: follow the chunks up to IEND."""
    size = file_size(handle)
    position = 8
    while position + 8 <= size:
        handle.seek(position)
        declared, name = struct.unpack(">I4s", handle.read(8))
        if name == b"IEND":
            return None
        position += 12 + declared
    missing = max(position + 12 - size, 12)
    return Truncation(missing, f"at least {missing} of the declared bytes are missing")


def _end_marker(handle: BinaryIO, form: str) -> Truncation | None:
    """JPEG: FF D9 within the last 4 kB, because cameras append trailers. GIF: 3B, optionally followed by zeros."""
    marker = b"\xff\xd9" if form == "JPEG" else b"\x3b"
    size = file_size(handle)
    handle.seek(max(0, size - 4096))
    tail = handle.read()
    if marker in tail if form == "JPEG" else tail.rstrip(b"\x00").endswith(marker):
        return None
    return Truncation(len(marker), f"the end marker is missing after {size} bytes")
