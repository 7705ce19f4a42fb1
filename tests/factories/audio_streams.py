"""Audio bitstreams written bit by bit: FLAC of any sample width, Ogg pages, MPEG tags. Inputs of ingest's tests."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import soundfile

RATE = 48_000


def tone(seconds: float, rate: int = RATE, frequency: float = 440.0, channels: int = 1) -> npt.NDArray[np.float64]:
    """Sine at half of full scale, [T] or [T, channels]."""
    wave = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    return wave if channels == 1 else np.repeat(wave[:, None], channels, axis=1)


def noise(seconds: float, rate: int = RATE, seed: int = 0) -> npt.NDArray[np.float64]:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate)).clip(-3, 3)


def encode(
    samples: npt.NDArray[np.floating], form: str = "WAV", subtype: str | None = None, rate: int = RATE, **options: object
) -> bytes:
    """Bytes of an audio file by libsndfile."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- MPEG


def mp3(samples: npt.NDArray[np.floating], rate: int = RATE, variable: bool = False, info: bool = True) -> bytes:
    """MP3 by LAME, with or without its Info frame."""
    mode = "VARIABLE" if variable else "CONSTANT"
    payload = encode(samples, "MP3", None, rate, bitrate_mode=mode, compression_level=0.5)
    return payload if info else payload[mp3_frame_length(payload) :]


def mp3_frame_length(header: bytes) -> int:
    """Bytes of a layer III frame."""
    version = (header[1] >> 3) & 3
    rate = (44_100, 48_000, 32_000)[(header[2] >> 2) & 3] >> {3: 0, 2: 1, 0: 2}[version]
    first = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
    second = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    kilobits = (first if version == 3 else second)[(header[2] >> 4) - 1]
    return (144 if version == 3 else 72) * kilobits * 1000 // rate + ((header[2] >> 1) & 1)


def id3v2(body_size: int = 500, fill: bytes = b"\xff\xfb\x90\x64") -> bytes:
    """ID3v2.3 tag with a picture frame whose bytes look like MPEG frame headers."""
    body = (fill * (body_size // len(fill) + 1))[:body_size]
    frame = b"APIC" + struct.pack(">I", len(body)) + b"\x00\x00" + body
    size = bytes((len(frame) >> shift) & 127 for shift in (21, 14, 7, 0))
    return b"ID3\x03\x00\x00" + size + frame


def id3v1() -> bytes:
    return b"TAG" + b"title".ljust(125, b"\x00")


def ape_tag(body_size: int = 400) -> bytes:
    """APEv2 tag with header and footer."""
    body = struct.pack("<II", body_size, 0) + b"Cover\x00" + b"\xff\xfb\x90\x64" * (body_size // 4)
    size = len(body) + 32
    header = b"APETAGEX" + struct.pack("<IIII8x", 2000, size, 1, 0xA000_0000)
    return header + body + b"APETAGEX" + struct.pack("<IIII8x", 2000, size, 1, 0x8000_0000)


# ---------------------------------------------------------------- FLAC


def _crc(payload: bytes, polynomial: int, width: int) -> int:
    register = 0
    top = 1 << (width - 1)
    for byte in payload:
        register ^= byte << (width - 8)
        for _ in range(8):
            register = ((register << 1) ^ polynomial if register & top else register << 1) & ((1 << width) - 1)
    return register


def flac_frames(samples: npt.NDArray[np.integer], bits: int, rate: int, block: int = 4096) -> list[bytes]:
    """FLAC frames of verbatim subframes; `samples` [T] or [T, C] of `bits` bits (8, 16, 24 or 32)."""
    grid = samples.reshape(len(samples), -1).astype(np.int64)
    frames = []
    for number, start in enumerate(range(0, len(grid), block)):
        part = grid[start : start + block]
        head = bytearray(b"\xff\xf8")
        head.append(0x70)  # 16-bit block size follows; the rate is in STREAMINFO
        head.append(((grid.shape[1] - 1) << 4) | ({8: 1, 16: 4, 24: 6, 32: 7}[bits] << 1))
        head += bytes([number]) if number < 128 else bytes([0xC0 | (number >> 6), 0x80 | (number & 63)])
        head += struct.pack(">H", len(part) - 1)
        head.append(_crc(bytes(head), 0x07, 8))
        body = bytearray()
        for channel in range(grid.shape[1]):
            body.append(0x02)  # verbatim, no wasted bits
            words = (part[:, channel] & ((1 << bits) - 1)).astype(">u8").tobytes()
            body += np.frombuffer(words, np.uint8).reshape(-1, 8)[:, 8 - bits // 8 :].tobytes()
        frame = bytes(head + body)
        frames.append(frame + struct.pack(">H", _crc(frame, 0x8005, 16)))
    return frames


def stream_info(rate: int, channels: int, bits: int, total: int, block: int = 4096) -> bytes:
    packed = (rate << 44) | ((channels - 1) << 41) | ((bits - 1) << 36) | total
    return struct.pack(">HH6xQ16x", block, block, packed)


def flac(
    samples: npt.NDArray[np.floating], bits: int = 16, rate: int = RATE, declared: int | None = None, block: int = 4096
) -> bytes:
    """FLAC file of `bits` bits whose STREAMINFO declares `declared` samples (default: the true number)."""
    whole = np.rint(samples * (2.0 ** (bits - 1) - 1)).astype(np.int64)
    channels = 1 if whole.ndim == 1 else whole.shape[1]
    info = stream_info(rate, channels, bits, len(whole) if declared is None else declared, block)
    return b"fLaC\x80\x00\x00\x22" + info + b"".join(flac_frames(whole, bits, rate, block))


# ---------------------------------------------------------------- Ogg


@cache
def _ogg_table() -> tuple[int, ...]:
    table = []
    for index in range(256):
        value = index << 24
        for _ in range(8):
            value = ((value << 1) ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
        table.append(value)
    return tuple(table)


def ogg_page(packets: Sequence[bytes], serial: int, number: int, granule: int = 0, flags: int = 0) -> bytes:
    """Page with whole packets."""
    lacing = b"".join(bytes([255] * (len(packet) // 255)) + bytes([len(packet) % 255]) for packet in packets)
    return ogg_seal(
        struct.pack("<4sBBqIIIB", b"OggS", 0, flags, granule, serial, number, 0, len(lacing)) + lacing + b"".join(packets)
    )


def ogg_seal(page: bytes) -> bytes:
    """Page with its checksum set."""
    page = page[:22] + bytes(4) + page[26:]
    register = 0
    table = _ogg_table()
    for byte in page:
        register = ((register << 8) & 0xFFFFFFFF) ^ table[(register >> 24) ^ byte]
    return page[:22] + struct.pack("<I", register) + page[26:]


def ogg_pages(payload: bytes) -> list[bytes]:
    """Pages of an Ogg file."""
    pages = []
    position = 0
    while position < len(payload):
        segments = payload[position + 26]
        end = position + 27 + segments + sum(payload[position + 27 : position + 27 + segments])
        pages.append(payload[position:end])
        position = end
    return pages


def with_serial(payload: bytes, serial: int) -> bytes:
    """Ogg file with another serial number."""
    return b"".join(ogg_seal(page[:14] + struct.pack("<I", serial) + page[18:]) for page in ogg_pages(payload))


def shifted_granules(payload: bytes, offset: int) -> bytes:
    """Ogg file whose positions start at `offset`, as in a recording of a running broadcast."""
    pages = []
    for page in ogg_pages(payload):
        granule = struct.unpack_from("<q", page, 6)[0]
        pages.append(ogg_seal(page[:6] + struct.pack("<q", granule + offset if granule > 0 else granule) + page[14:]))
    return b"".join(pages)


def skeleton(serial: int = 77) -> tuple[bytes, bytes]:
    """First and last page of an Ogg Skeleton 3.0 stream."""
    head = b"fishead\x00" + struct.pack("<HH", 3, 0) + bytes(52)
    return ogg_page([head], serial, 0, flags=2), ogg_page([b""], serial, 1, flags=4)


def with_skeleton(payload: bytes, serial: int = 77) -> bytes:
    """Ogg file with a Skeleton stream whose first page comes first."""
    first, *rest = ogg_pages(payload)
    head, end = skeleton(serial)
    return b"".join([head, first, end, *rest])


def ogg_flac(samples: npt.NDArray[np.floating], rate: int = RATE, serial: int = 5) -> bytes:
    """FLAC in Ogg (mapping 1.0), one frame a page."""
    whole = np.rint(samples * 32767).astype(np.int64)
    info = stream_info(rate, 1, 16, len(whole))
    head = b"\x7fFLAC\x01\x00\x00\x01fLaC\x00\x00\x00\x22" + info
    comment = b"\x84\x00\x00\x08" + bytes(8)
    frames = flac_frames(whole, 16, rate)
    pages = [ogg_page([head], serial, 0, flags=2), ogg_page([comment], serial, 1)]
    for number, frame in enumerate(frames):
        end = min((number + 1) * 4096, len(whole))
        pages += split_packet(frame, serial, number + 2, end, 4 if number == len(frames) - 1 else 0)
    return b"".join(pages)


def split_packet(packet: bytes, serial: int, number: int, granule: int, flags: int) -> Iterable[bytes]:
    """One packet as one page; a page holds 65 025 bytes."""
    assert len(packet) < 65_025
    return [ogg_page([packet], serial, number, granule, flags)]


def ogg_other(head: bytes, serial: int = 9) -> bytes:
    """Ogg file of a codec that is known by its first packet only."""
    return ogg_page([head], serial, 0, flags=2) + ogg_page([bytes(40)], serial, 1, 960, flags=4)


# ---------------------------------------------------------------- RIFF and AIFF


def riff(chunks: Sequence[tuple[bytes, bytes]], form: bytes = b"WAVE", outer: int | None = None) -> bytes:
    """RIFF file of (name, data) chunks; `outer` replaces the outer size."""
    body = form + b"".join(name + struct.pack("<I", len(data)) + data + b"\x00" * (len(data) & 1) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) if outer is None else outer) + body


def wav_format(tag: int = 1, bits: int = 16, rate: int = RATE, channels: int = 1, extra: bytes = b"") -> bytes:
    align = max(1, bits // 8) * channels
    return struct.pack("<HHIIHH", tag, channels, rate, rate * align, align, bits) + extra
