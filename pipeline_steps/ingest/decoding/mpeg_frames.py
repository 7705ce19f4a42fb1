"""Frames of an MPEG audio file (layers I to III), counted by their headers. Tags around them are no audio."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NamedTuple

_RATES = (44_100, 48_000, 32_000)
_KILOBITS = {
    (3, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""(MPEG version, layer) -> bit rates of the indices 1 to 14. MPEG 2 has one table for layers II and III."""

LOOKAHEAD = 3
"""Consecutive headers, or fewer up to the end or a tag, by which the first frame of a part is recognized."""


class FrameHeader(NamedTuple):
    """Header of one frame. `version` is the field's value: 3 MPEG 1, 2 MPEG 2, 0 MPEG 2.5."""

    version: int
    layer: int
    rate: int
    channels: int
    length: int

    @property
    def samples(self) -> int:
        return 384 if self.layer == 1 else 576 if self.layer == 3 and self.version != 3 else 1152


@dataclass
class MpegPart:
    """Consecutive frames of one rate and channel count. `declared` frames are those of its Xing, Info or VBRI header."""

    header: FrameHeader
    declared: int | None = None
    info_length: int = 0
    frames: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return self.frames * self.header.samples

    def add(self, start: int, end: int) -> None:
        """Append bytes [start, end), which are adjacent to the last span or begin another."""
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = (self.spans[-1][0], end)
        else:
            self.spans.append((start, end))

    def payload(self, data: bytes, info: bool) -> bytes:
        """Bytes of the frames alone, optionally with the information frame at their start."""
        joined = b"".join(data[start:end] for start, end in self.spans)
        return joined if info else joined[self.info_length :]


class MpegScan(NamedTuple):
    """Parts of a file; bytes between and after them that are neither frames, tags nor zeros; and bytes of a cut last frame."""

    parts: list[MpegPart]
    foreign_bytes: int
    cut_bytes: int

    @property
    def seconds(self) -> float:
        return sum(part.samples / part.header.rate for part in self.parts)


def parse_header(data: bytes, position: int) -> FrameHeader | None:
    """Frame header at a position, or None. Free-format frames, whose length is not stated, count as none."""
    if position + 4 > len(data) or data[position] != 0xFF or data[position + 1] & 0xE0 != 0xE0:
        return None
    _, second, third, fourth = data[position : position + 4]
    version, layer = (second >> 3) & 3, 4 - ((second >> 1) & 3)
    index, rate_index, padding = third >> 4, (third >> 2) & 3, (third >> 1) & 1
    if version == 1 or layer == 4 or index in {0, 15} or rate_index == 3:
        return None
    rate = _RATES[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * _KILOBITS[3 if version == 3 else 2, layer if version == 3 or layer == 1 else 2][index - 1]
    channels = 1 if fourth >> 6 == 3 else 2
    header = FrameHeader(version, layer, rate, channels, 0)
    length = (12 * bits // rate + padding) * 4 if layer == 1 else header.samples // 8 * bits // rate + padding
    return header._replace(length=length)


def scan_mpeg(data: bytes, max_seconds: float) -> MpegScan:
    """Find all frames of a file; the scan ends early once the frames are longer than `max_seconds`."""
    parts: list[MpegPart] = []
    foreign = cut = position = 0
    seconds = 0.0
    while position < len(data) and seconds <= max_seconds:
        header = parse_header(data, position)
        if header and (_same_stream(parts, header) or _is_frame(data, position, header)):
            end = position + header.length
            if end > len(data):
                cut = len(data) - position
                break
            declared = _declared_frames(data, position, header)
            if declared is not None or not _same_stream(parts, header):
                parts.append(MpegPart(header, declared if declared else None))
            part = parts[-1]
            part.add(position, end)
            if declared is not None:
                part.info_length = header.length
            else:
                part.frames += 1
                seconds += header.samples / header.rate
            position = end
            continue
        if skip := _tag_length(data, position):
            position += skip
            continue
        following = _next_candidate(data, position + 1)
        foreign += following - position - data.count(0, position, following)
        position = following
    return MpegScan([part for part in parts if part.frames], foreign, cut)


def _same_stream(parts: list[MpegPart], header: FrameHeader) -> bool:
    return bool(parts) and parts[-1].header._replace(length=0) == header._replace(length=0)


def _is_frame(data: bytes, position: int, header: FrameHeader) -> bool:
    """Whether further frames of the same kind, a tag or the end of the file follow."""
    for _ in range(LOOKAHEAD):
        position += header.length
        if position == len(data) or _tag_length(data, position):
            return True
        following = parse_header(data, position)
        if following is None or following[:3] != header[:3]:
            return False
        header = following
    return True


def _declared_frames(data: bytes, position: int, header: FrameHeader) -> int | None:
    """Frames that an information frame declares (0 if it does not), or None for a frame of audio."""
    if header.layer != 3:
        return None
    side = {(3, 2): 32, (3, 1): 17, (2, 2): 17, (2, 1): 9}[3 if header.version == 3 else 2, header.channels]
    xing = position + 4 + side
    if data[xing : xing + 4] in {b"Xing", b"Info"}:
        flags, frames = struct.unpack_from(">II", data.ljust(xing + 12, b"\x00") if xing + 12 > len(data) else data, xing + 4)
        return frames if flags & 1 else 0
    vbri = position + 36
    if data[vbri : vbri + 4] == b"VBRI" and vbri + 18 <= len(data):
        return int(struct.unpack_from(">I", data, vbri + 14)[0])
    return None


def _tag_length(data: bytes, position: int) -> int:
    """Bytes of the ID3, APE or Lyrics3 tag at a position; 0 if there is none."""
    head = data[position : position + 32]
    if head[:3] == b"ID3" and len(head) >= 10 and all(byte < 128 for byte in head[6:10]):
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return size + (20 if head[5] & 16 else 10)
    if head[:8] == b"APETAGEX" and len(head) == 32:
        size, _, flags = struct.unpack_from("<III", head, 12)
        return size + 32 if flags & 0x2000_0000 else 32
    if head[:4] == b"TAG+":
        return 227
    if head[:3] == b"TAG":
        end = position + 128
        return 128 if end >= len(data) - 32 or parse_header(data, end) or data[end : end + 3] in {b"ID3", b"APE"} else 0
    if head[:11] == b"LYRICSBEGIN":
        ends = [data.find(mark, position) for mark in (b"LYRICS200", b"LYRICSEND")]
        return max(end + 9 - position for end in ends) if max(ends) >= 0 else 0
    return 0


def _next_candidate(data: bytes, position: int) -> int:
    """Position of the next byte that may begin a frame or a tag, or the end."""
    found = [data.find(mark, position) for mark in (b"\xff", b"ID3", b"APETAGEX", b"TAG", b"LYRICSBEGIN")]
    return min([place for place in found if place >= 0], default=len(data))
