"""Image files written byte by byte: TIFF of any depth, PNG and JPEG with odd metadata, BMP, ICC profiles."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

SHORT, LONG, RATIONAL, ASCII = 3, 4, 5, 2
Pixels = npt.NDArray[np.uint8]


def gradient(width: int = 96, height: int = 64) -> Pixels:
    """Two gradients and a patch, RGB uint8 [height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 255 * (x + y) / (width + height - 2)], -1)
    image[height // 4 : height // 2, width // 4 : width // 2] = (220, 40, 90)
    return np.rint(image).astype(np.uint8)


def gray(width: int = 96, height: int = 64) -> Pixels:
    return gradient(width, height)[..., 2]


def encode(array: npt.NDArray[np.generic], form: str, mode: str | None = None, **options: object) -> bytes:
    image = Image.fromarray(array)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, form, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------- TIFF


def packed(samples: npt.NDArray[np.integer], bits: int) -> bytes:
    """Rows of samples of any number of bits, most significant bit first, each row padded to a byte."""
    rows = samples.reshape(len(samples), -1).astype(np.uint32)
    planes = (rows[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint32)) & 1
    return np.packbits(planes.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    samples: npt.NDArray[np.integer],
    bits: int = 8,
    photometric: int | None = None,
    order: str = "<",
    big: bool = False,
    tags: Mapping[int, tuple[int, Sequence[int]]] | None = None,
    data: bytes | None = None,
) -> bytes:
    """Uncompressed TIFF of one strip. `samples` [H, W] or [H, W, C] of `bits` bits; `tags` are added or replace others."""
    height, width = samples.shape[:2]
    channels = 1 if samples.ndim == 2 else samples.shape[2]
    if data is None and bits in {16, 32}:
        data = samples.astype(f"{order}u{bits // 8}").tobytes()
    data = packed(samples, bits) if data is None else data
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [bits] * channels), 259: (SHORT, [1]),
        262: (SHORT, [(1 if channels < 3 else 2) if photometric is None else photometric]), 273: (LONG, [0]),
        277: (SHORT, [channels]), 278: (LONG, [height]), 279: (LONG, [len(data)]), **(tags or {}),
    }  # fmt: skip
    word, count, head = ("Q", "Q", 16) if big else ("I", "H", 8)
    width_of = {SHORT: 2, LONG: 4, RATIONAL: 8, ASCII: 1}
    size = struct.calcsize(f"={count}") + len(entries) * (20 if big else 12) + struct.calcsize(f"={word}")
    after = head + size
    place = after + sum(len(v) * width_of[k] for k, v in entries.values() if len(v) * width_of[k] > (8 if big else 4))
    directory, outside = struct.pack(f"{order}{count}", len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        values = [place + place % 2] if tag == 273 else values
        code = {SHORT: "H", LONG: "I", RATIONAL: "Q", ASCII: "B"}[kind]
        body = struct.pack(f"{order}{len(values)}{code}", *values)
        directory += struct.pack(f"{order}HH{word}", tag, kind, len(values))
        limit = 8 if big else 4
        if len(body) <= limit:
            directory += body.ljust(limit, b"\x00")
        else:
            directory += struct.pack(f"{order}{word}", after + len(outside))
            outside += body
    directory += struct.pack(f"{order}{word}", 0)
    mark = b"II" if order == "<" else b"MM"
    start = struct.pack(f"{order}HHHQ", 43, 8, 0, 16) if big else struct.pack(f"{order}HI", 42, 8)
    return mark + start + directory + outside + b"\x00" * (place % 2) + data


# ---------------------------------------------------------------- PNG


def png_chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(data))
        + name
        + data
        + struct.pack(">I", zlib.crc32(name + data) if checksum is None else checksum)
    )


def with_chunk(payload: bytes, chunk: bytes, before: bytes = b"IDAT") -> bytes:
    """PNG with a chunk before the first one of a name."""
    place = payload.find(before) - 4
    return payload[:place] + chunk + payload[place:]


# ---------------------------------------------------------------- JPEG


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def with_segment(payload: bytes, marker: int, data: bytes) -> bytes:
    """JPEG with a segment after its start."""
    return payload[:2] + segment(marker, data) + payload[2:]


def without_segment(payload: bytes, marker: int) -> bytes:
    place = payload.find(bytes([0xFF, marker]))
    return payload[:place] + payload[place + 2 + int.from_bytes(payload[place + 2 : place + 4], "big") :]


def exif(orientation: int, *others: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF block with an orientation and entries (tag, kind, count, four bytes)."""
    entries = sorted([(274, SHORT, 1, struct.pack(f"{order}HH", orientation, 0)), *others])
    body = struct.pack(f"{order}H", len(entries))
    body += b"".join(struct.pack(f"{order}HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    head = b"II*\x00" if order == "<" else b"MM\x00*"
    return b"Exif\x00\x00" + head + struct.pack(f"{order}I", 8) + body + bytes(4)


# ---------------------------------------------------------------- BMP


def bmp(image: Pixels, header: int = 40, alpha: int | None = None, declared: int | None = None) -> bytes:
    """32-bit BMP with a V3 (56), V4 (108) or V5 (124) header and `alpha` in every pixel, or 24 bit without alpha."""
    height, width = image.shape[:2]
    bottom_up = image[::-1, :, ::-1]
    if alpha is None:
        stride = -(-width * 3 // 4) * 4
        rows = np.zeros((height, stride), np.uint8)
        rows[:, : width * 3] = bottom_up.reshape(height, -1)
        data, depth, compression = rows.tobytes(), 24, 0
    else:
        data = np.dstack([bottom_up, np.full((height, width), alpha, np.uint8)]).tobytes()
        depth, compression = 32, 3 if header > 40 else 0
    info = struct.pack("<IiiHHIIiiII", header, width, height, 1, depth, compression, len(data), 2835, 2835, 0, 0)
    if header > 40:
        info += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = info.ljust(header, b"\x00")
    size = 14 + len(info) + len(data)
    return b"BM" + struct.pack("<IHHI", size if declared is None else declared, 0, 0, 14 + len(info)) + info + data


# ---------------------------------------------------------------- ICC


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(*values: float) -> bytes:
    return b"XYZ \x00\x00\x00\x00" + b"".join(map(_fixed, values))


def _gamma(value: float) -> bytes:
    return b"curv\x00\x00\x00\x00" + struct.pack(">IH", 1, round(value * 256)) + b"\x00\x00"


SRGB_PRIMARIES = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))


def icc(space: str, gamma: float, name: str = "test", swap: bool = False) -> bytes:
    """ICC version 2 profile for GRAY or RGB values; `swap` exchanges red and blue."""
    text = name.encode() + b"\x00"
    description = b"desc\x00\x00\x00\x00" + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": description + bytes(-len(description) % 4), b"wtpt": _xyz(0.9642, 1, 0.8249)}
    if space == "GRAY":
        tags[b"kTRC"] = _gamma(gamma)
    else:
        order = (2, 1, 0) if swap else (0, 1, 2)
        for letter, index in zip(b"rgb", order, strict=True):
            tags[bytes([letter]) + b"XYZ"] = _xyz(*SRGB_PRIMARIES[index])
            tags[bytes([letter]) + b"TRC"] = _gamma(gamma)
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, value in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += value
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", space.ljust(4).encode(), b"XYZ ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    head += _fixed(0.9642) + _fixed(1) + _fixed(0.8249) + bytes(48)
    return head + table + body


def srgb_codes(linear: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """sRGB values 0..255 of linear light 0..1."""
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.power(linear, 1 / 2.4) - 0.055)
