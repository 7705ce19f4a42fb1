"""Logical streams of an Ogg file (RFC 3533): chained, multiplexed, or with other bytes around their pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

CODECS = ((b"\x01vorbis", "Vorbis"), (b"OpusHead", "Opus"), (b"\x7fFLAC", "FLAC"))
"""First bytes of a stream -> codec that can be decoded."""

OTHER_AUDIO = ((b"Speex   ", "Speex"), (b"PCM     ", "PCM"), (b"\x01audio\x00\x00\x00", "OGM audio"), (b"CELT    ", "CELT"))
OTHER_STREAMS = (
    (b"\x80theora", "Theora"), (b"BBCD\x00", "Dirac"), (b"\x01video\x00\x00\x00", "OGM video"), (b"fishead\x00", "Skeleton"),
    (b"\x80kate", "Kate"), (b"CMML\x00", "CMML"),
)  # fmt: skip

_CONTINUED, _FIRST, _LAST = 1, 2, 4


@dataclass
class OggStream:
    """One logical stream: its codec, its pages as byte ranges, and whether its last page is present."""

    serial: bytes
    codec: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    complete: bool = False

    def payload(self, data: bytes) -> bytes:
        """Ogg file with the pages of this stream alone."""
        return b"".join(data[start:end] for start, end in self.spans)


class OggScan(NamedTuple):
    """Audio streams that play one after the other; codecs of the streams beside them; bytes that belong to no page."""

    audio: list[OggStream]
    others: list[str]
    foreign_bytes: int
    missing: str


def scan_ogg(data: bytes) -> OggScan:
    """Group the pages of a file by stream. Streams whose first pages are adjacent play at the same time: a group."""
    groups: list[list[OggStream]] = []
    open_streams: dict[bytes, OggStream] = {}
    foreign = position = 0
    missing = ""
    in_heads = False
    while position < len(data):
        if not data.startswith(b"OggS", position):
            following = data.find(b"OggS", position + 1)
            following = len(data) if following < 0 else following
            foreign += following - position
            position = following
            continue
        lacing = data[position + 27 : position + 27 + data[position + 26]] if position + 27 <= len(data) else b""
        end = position + 27 + len(lacing) + sum(lacing)
        if position + 27 > len(data) or len(lacing) < data[position + 26] or end > len(data):
            missing = (
                f"the last Ogg page lacks {end - len(data)} bytes" if end > len(data) else "the last Ogg page header is cut"
            )
            break
        flags, serial = data[position + 5], data[position + 14 : position + 18]
        if flags & _FIRST:
            if not in_heads:
                groups.append([])
            stream = OggStream(serial, _codec(data[position + 27 + len(lacing) : end]))
            groups[-1].append(stream)
            open_streams[serial] = stream
        in_heads = bool(flags & _FIRST)
        if serial in open_streams:
            open_streams[serial].spans.append((position, end))
            open_streams[serial].complete |= bool(flags & _LAST)
        else:
            foreign += end - position  # a page of a stream whose beginning is missing
        position = end
    names = [name for _, name in CODECS]
    audio: list[OggStream] = []
    others: list[str] = []
    for group in groups:
        playable = [stream for stream in group if stream.codec in names]
        audio += playable[:1]
        others += [stream.codec for stream in group if stream not in playable[:1]]
    if audio and not audio[-1].complete:
        missing = missing or "the page that ends the Ogg stream is missing"
    elif audio:
        missing = ""
    return OggScan(audio, others, foreign, missing)


def _codec(packet: bytes) -> str:
    for magic, name in (*CODECS, *OTHER_AUDIO, *OTHER_STREAMS):
        if packet.startswith(magic):
            return name
    return "an unknown codec"
