from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.ingest.decoding.mpeg_frames import parse_header, scan_mpeg
from tests.factories.audio_streams import ape_tag, id3v1, id3v2, mp3, mp3_frame_length, noise

PLAIN = mp3(noise(1, 22_050), 22_050, info=False)
WITH_INFO = mp3(noise(1, 22_050), 22_050)


def test_every_frame_is_counted() -> None:
    scan = scan_mpeg(PLAIN, 60)
    part = scan.parts[0]
    assert (part.header.rate, part.header.channels, part.header.samples) == (22_050, 1, 576)
    assert (part.declared, part.spans) == (None, [(0, len(PLAIN))])
    position = frames = 0
    while position < len(PLAIN):
        position += mp3_frame_length(PLAIN[position:])
        frames += 1
    assert part.frames == frames
    assert (scan.foreign_bytes, scan.cut_bytes) == (0, 0)


def test_frame_of_an_information_header_is_no_audio() -> None:
    part = scan_mpeg(WITH_INFO, 60).parts[0]
    assert part.declared == part.frames == scan_mpeg(PLAIN, 60).parts[0].frames
    assert part.payload(WITH_INFO, info=True) == WITH_INFO
    assert part.payload(WITH_INFO, info=False) == PLAIN


def test_tags_are_no_audio_and_no_foreign_bytes() -> None:
    tagged = id3v2(5000) + PLAIN + ape_tag() + id3v1()
    scan = scan_mpeg(tagged, 60)
    assert scan.parts[0].payload(tagged, info=False) == PLAIN
    assert scan.foreign_bytes == 0


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"\xff\xfb\x90\x00", (3, 3, 44_100, 2, 417)),
        (b"\xff\xfb\x92\x00", (3, 3, 44_100, 2, 418)),
        (b"\xff\xfd\x84\xc0", (3, 2, 48_000, 1, 384)),
        (b"\xff\xff\x14\xc0", (3, 1, 48_000, 1, 32)),
        (b"\xff\xf3\x40\xc0", (2, 3, 22_050, 1, 104)),
        (b"\xff\xe3\x18\xc0", (0, 3, 8_000, 1, 72)),
        (b"\xff\xfb\x00\x00", None),
        (b"\xff\xfb\xf0\x00", None),
        (b"\xff\xf1\x50\x80", None),
        (b"\xff\xfb", None),
    ],
)
def test_headers(header: bytes, expected: tuple[int, ...] | None) -> None:
    assert parse_header(header, 0) == expected


@given(st.binary(max_size=400), st.integers(0, 300), st.integers(0, 400))
def test_any_bytes_are_scanned(junk: bytes, start: int, end: int) -> None:
    scan = scan_mpeg(PLAIN[start : start + end] + junk + WITH_INFO[:end], 60)
    assert sum(part.frames for part in scan.parts) <= 40
