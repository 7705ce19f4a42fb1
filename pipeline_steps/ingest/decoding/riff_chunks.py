"""Chunks of a WAV or AIFF file: the sizes that they declare against the bytes that are present.

Decoders read a cut file without an error, and take the size 0 of a header that was never finished for "no samples".
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

from pipeline_steps.core.safe_paths import file_size

UNKNOWN_SIZE = 0x7F00_0000
"""Least size that recorders and pipes declare while the length is unknown (about 2 or 4 GB)."""

MAX_HEADER_BYTES = 1 << 20
"""Chunks before the audio above this size are not searched for a codec."""

CODECS = {
    1: "PCM", 2: "MS ADPCM", 3: "float", 6: "A-law", 7: "mu-law", 0x10: "OKI ADPCM", 0x11: "IMA ADPCM", 0x20: "Yamaha ADPCM",
    0x28: "G.721", 0x31: "GSM 6.10", 0x40: "G.721", 0x42: "G.723", 0x45: "G.726", 0x50: "MPEG", 0x55: "MP3", 0x65: "G.722",
    0x28F: "G.722", 0x92: "AC-3", 0xFF: "AAC", 0x160: "WMA", 0x161: "WMA", 0x162: "WMA", 0x163: "WMA", 0x1600: "AAC",
    0x1602: "AAC", 0x2000: "AC-3", 0x2001: "DTS", 0x566F: "Vorbis", 0xA106: "AAC", 0xF1AC: "FLAC",
}  # fmt: skip
"""wFormatTag -> name."""


class ChunkScan(NamedTuple):
    """Result for one file.

    Attributes:
        codec: name of the coding; "" if there is no format chunk.
        truncation: how it shows that bytes of the audio are missing; "" if none are.
        impossible_header: the header never described this file; otherwise the file was cut.
        audio_offset: first byte of the samples; 0 if there is no chunk of samples.
        audio_bytes: bytes of samples that are present.
        unfinished: the size was never written.
        foreign_bytes: bytes after the audio that are no chunks.
    """

    codec: str
    truncation: str
    impossible_header: bool
    audio_offset: int
    audio_bytes: int
    unfinished: bool
    foreign_bytes: int


def scan_chunks(handle: BinaryIO, form: str) -> ChunkScan:
    """Follow the chunks of a WAV (RIFF, RIFX) or AIFF (FORM) file. The position of `handle` is 0 afterwards."""
    try:
        return _scan(handle, form)
    finally:
        handle.seek(0)


def _scan(handle: BinaryIO, form: str) -> ChunkScan:
    size = file_size(handle)
    handle.seek(0)
    head = handle.read(12)
    order = ">" if head[:4] in {b"FORM", b"RIFX"} else "<"
    outer = struct.unpack(f"{order}I", head[4:8])[0] + 8 if len(head) == 12 else 0
    audio_chunk = b"data" if form == "WAV" else b"SSND"
    codec = ""
    position = 12
    while position + 8 <= size:
        handle.seek(position)
        name, declared = struct.unpack(f"{order}4sI", handle.read(8))
        available = size - position - 8
        if name == audio_chunk:
            return _audio_chunk(handle, (position + 8, declared, available), outer, size, order, codec)
        if declared > available:
            break  # cut before the audio begins: the decoder reports it
        if name in {b"fmt ", b"COMM"} and declared <= MAX_HEADER_BYTES:
            codec = _wav_codec(handle.read(declared), order) if form == "WAV" else _aiff_codec(handle.read(declared), head)
        position += 8 + declared + (declared & 1)
    return ChunkScan(codec, "", False, 0, 0, False, 0)


def _audio_chunk(handle: BinaryIO, chunk: tuple[int, int, int], outer: int, size: int, order: str, codec: str) -> ChunkScan:
    offset, declared, available = chunk
    name = "SSND" if order == ">" and codec.startswith("AIFF") else "data"
    stated = 8 if name == "SSND" else 0  # the samples of AIFF follow two fields
    open_outer = outer - 8 >= UNKNOWN_SIZE or outer <= 8
    if declared > available:
        if declared >= UNKNOWN_SIZE and open_outer:
            return ChunkScan(codec, "", False, offset, available, True, 0)
        impossible = outer <= size or (declared >= UNKNOWN_SIZE and declared > 2 * available)
        reason = f"chunk {name!r} declares {declared} bytes, {available} are present"
        return ChunkScan(codec, reason, impossible, offset, available, False, 0)
    rest = _bytes_outside_chunks(handle, offset + declared + (declared & 1), size, order)
    covered = outer > offset + declared + 1  # the file's own size counts the bytes behind the samples
    if rest > 0 and (declared <= stated or (covered and not open_outer and outer <= size + 1)):
        return ChunkScan(codec, "", False, offset, available, True, 0)
    return ChunkScan(codec, "", False, offset, declared, False, rest)


def _bytes_outside_chunks(handle: BinaryIO, position: int, size: int, order: str) -> int:
    """Bytes from `position` to the end that are neither chunks nor zeros."""
    while position + 8 <= size:
        handle.seek(position)
        name, declared = struct.unpack(f"{order}4sI", handle.read(8))
        if not all(32 <= byte < 127 for byte in name) or declared > size - position - 8:
            break
        position += 8 + declared + (declared & 1)
    handle.seek(min(position, size))
    rest = 0
    while block := handle.read(1 << 20):
        rest += len(block) - block.count(0)
    return rest


def _wav_codec(chunk: bytes, order: str) -> str:
    if len(chunk) < 16:
        return ""
    tag, bits = struct.unpack_from(f"{order}H", chunk)[0], struct.unpack_from(f"{order}H", chunk, 14)[0]
    if tag == 0xFFFE and len(chunk) >= 26:  # WAVE_FORMAT_EXTENSIBLE: the tag begins the GUID
        tag = struct.unpack_from(f"{order}H", chunk, 24)[0]
    name = CODECS.get(tag, f"codec 0x{tag:04x}")
    return f"{bits}-bit {name}" if tag in {1, 3} else name


def _aiff_codec(chunk: bytes, head: bytes) -> str:
    if head[8:12] != b"AIFC" or len(chunk) < 22:
        return f"AIFF {struct.unpack_from('>H', chunk, 6)[0] if len(chunk) >= 8 else 0}-bit PCM"
    return f"AIFF-C {chunk[18:22].decode('latin-1').strip()}"


def finish_header(payload: bytes, scan: ChunkScan, form: str) -> bytes:
    """Copy of an unfinished file with the sizes that its bytes have."""
    patched = bytearray(payload)
    order = ">" if payload[:4] in {b"FORM", b"RIFX"} else "<"
    struct.pack_into(f"{order}I", patched, 4, min(len(payload) - 8, 0xFFFF_FFFF))
    struct.pack_into(f"{order}I", patched, scan.audio_offset - 4, scan.audio_bytes)
    comm = payload.find(b"COMM", 12, scan.audio_offset) if form == "AIFF" else -1
    if comm >= 0:
        channels, _, bits = struct.unpack_from(">HIH", payload, comm + 8)
        frame = max(1, channels * ((bits + 7) // 8))
        struct.pack_into(">I", patched, comm + 10, (scan.audio_bytes - 8) // frame)
    return bytes(patched)
