from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.ingest.decoding.ogg_pages import scan_ogg
from tests.factories.audio_streams import encode, noise, ogg_other, ogg_pages, with_serial, with_skeleton

VORBIS = encode(noise(1), "OGG", "VORBIS")
OPUS = with_serial(encode(noise(1), "OGG", "OPUS"), 7)


def test_pages_of_one_stream_are_the_file() -> None:
    scan = scan_ogg(VORBIS)
    assert [stream.payload(VORBIS) for stream in scan.audio] == [VORBIS]
    assert (scan.others, scan.foreign_bytes, scan.missing) == ([], 0, "")


def test_streams_are_separated() -> None:
    chained = with_skeleton(VORBIS) + OPUS
    scan = scan_ogg(chained)
    assert [stream.codec for stream in scan.audio] == ["Vorbis", "Opus"]
    assert [stream.payload(chained) for stream in scan.audio] == [VORBIS, OPUS]
    assert scan.others == ["Skeleton"]


def test_first_of_two_simultaneous_streams_is_audio() -> None:
    one, two = ogg_pages(VORBIS), ogg_pages(OPUS)
    scan = scan_ogg(b"".join([one[0], two[0], *one[1:], *two[1:]]))
    assert [stream.codec for stream in scan.audio] == ["Vorbis"]
    assert scan.others == ["Opus"]


def test_missing_pages() -> None:
    assert "lacks 10 bytes" in scan_ogg(VORBIS[:-10]).missing
    assert "ends the Ogg stream is missing" in scan_ogg(b"".join(ogg_pages(VORBIS)[:-1])).missing
    cut_video = b"".join(ogg_pages(ogg_other(b"\x80theora" + bytes(35)))[:1])
    assert scan_ogg(cut_video + VORBIS).missing == ""


@given(st.binary(max_size=300), st.integers(0, len(VORBIS)), st.integers(0, len(VORBIS)))
def test_any_bytes_are_scanned(junk: bytes, start: int, end: int) -> None:
    data = VORBIS[start:end] + junk + VORBIS[: end - start if end > start else 0]
    scan = scan_ogg(data)
    spans = sorted(span for stream in scan.audio for span in stream.spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    assert 0 <= scan.foreign_bytes <= len(data)
