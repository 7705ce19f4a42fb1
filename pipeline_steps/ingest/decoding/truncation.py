"""Detection of truncated files by the lengths in their structure. Decoders read a truncated WAV or Ogg without an error.

Only headers are read. No declared size is allocated, and every step moves forward.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from pipeline_steps.core.safe_paths import file_size

STREAMING = 0x7F00_0000
"""Least size that recorders declare before the length is known (about 2 or 4 GB)."""


class Truncation(NamedTuple):
    """Bytes missing from a file. `impossible_header`: the header never described this file; otherwise the file was cut."""

    missing: int
    impossible_header: bool
    reason: str


def find_truncation(handle: BinaryIO, form: str) -> Truncation | None:
    """Find out whether a WAV, AIFF, OGG, WEBP, PNG, GIF, BMP or JPEG file is truncated; None if it is complete.

    The position of `handle` is 0 afterwards.
    """
    checks: dict[str, Callable[[BinaryIO, str], Truncation | None]] = {
        "WAV": _chunks, "AIFF": _chunks, "OGG": _ogg, "WEBP": _declared_size, "BMP": _declared_size, "PNG": _png,
        "JPEG": _end_marker, "GIF": _end_marker,
    }  # fmt: skip
    if form not in checks:
        return None
    handle.seek(0)
    try:
        return checks[form](handle, form)
    finally:
        handle.seek(0)


def _chunks(handle: BinaryIO, form: str) -> Truncation | None:
    """RIFF/WAVE and FORM/AIFF: compare the size of the audio chunk with the file."""
    size = file_size(handle)
    head = handle.read(12)
    if len(head) < 12:
        return None
    order = ">" if head[:4] in {b"FORM", b"RIFX"} else "<"
    outer = struct.unpack(f"{order}I", head[4:8])[0] + 8
    audio_chunk = b"data" if form == "WAV" else b"SSND"
    position = 12
    while position + 8 <= size:
        handle.seek(position)
        name, declared = struct.unpack(f"{order}4sI", handle.read(8))
        available = size - position - 8
        if declared > available and name != audio_chunk:
            return None  # cut before the audio begins: the decoder reports it
        if declared > available:
            impossible = outer <= size or (declared >= STREAMING and declared > 2 * available)
            reason = f"chunk {audio_chunk.decode()!r} declares {declared} bytes, {available} are present"
            return Truncation(declared - available, impossible, reason)
        position += 8 + declared + (declared & 1)
    return None


def _ogg(handle: BinaryIO, form: str) -> Truncation | None:
    """Ogg: check that every page is complete and each logical stream has its last page (RFC 3533, flag 4)."""
    size = file_size(handle)
    position = 0
    open_streams: set[bytes] = set()
    while position < size:
        handle.seek(position)
        head = handle.read(27)
        if len(head) < 27:
            return Truncation(27 - len(head), False, "the last Ogg page header is cut")
        if head[:4] != b"OggS":
            return None  # other data between pages: left to the decoder
        segments = handle.read(head[26])
        length = 27 + head[26] + sum(segments)
        if len(segments) < head[26] or position + length > size:
            return Truncation(position + length - size, False, f"the last Ogg page lacks {position + length - size} bytes")
        serial = head[14:18]
        if head[5] & 4:
            open_streams.discard(serial)
        else:
            open_streams.add(serial)
        position += length
    if open_streams:
        return Truncation(0, False, "the page that ends the Ogg stream is missing")
    return None


def _declared_size(handle: BinaryIO, form: str) -> Truncation | None:
    """WEBP and BMP: compare the size that the header declares with the file."""
    size = file_size(handle)
    offset, extra = (4, 8) if form == "WEBP" else (2, 0)
    field = handle.read(12)[offset : offset + 4]
    declared = int.from_bytes(field, "little") + extra if len(field) == 4 else 0
    if declared > size:
        return Truncation(declared - size, False, f"the header declares {declared} bytes, {size} are present")
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
    return Truncation(missing, False, f"at least {missing} of the declared bytes are missing")


def _end_marker(handle: BinaryIO, form: str) -> Truncation | None:
    """JPEG: FF D9 within the last 4 kB, because cameras append trailers. GIF: 3B, optionally followed by zeros."""
    marker = b"\xff\xd9" if form == "JPEG" else b"\x3b"
    size = file_size(handle)
    handle.seek(max(0, size - 4096))
    tail = handle.read()
    if marker in tail if form == "JPEG" else tail.rstrip(b"\x00").endswith(marker):
        return None
    return Truncation(len(marker), False, f"the end marker is missing after {size} bytes")
