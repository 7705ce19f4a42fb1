from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.ingest.file_signatures import (
    check_format,
    detect_format,
    extension,
    has_wrong_extension,
    is_candidate,
    kind_from_extension,
)
from pipeline_steps.ingest.reason_codes import CODES, RejectedItemError

SIGNATURES = {
    b"\xff\xd8\xff\xe0": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF89a": "GIF", b"II*\x00": "TIFF",
    b"RIFF\x10\x00\x00\x00WEBPVP8 ": "WEBP",
    b"RIFF\x10\x00\x00\x00WAVEfmt ": "WAV", b"fLaC": "FLAC", b"OggS": "OGG",
    b"FORM\x00\x00\x00\x10AIFC": "AIFF", b"ID3\x04": "MP3",
    b"\xff\xfb\x90\x64": "MP3", b"BM" + bytes(12) + b"\x28\x00\x00\x00": "BMP",
}  # fmt: skip


@pytest.mark.parametrize("head", SIGNATURES, ids=SIGNATURES.values())
def test_allowed_formats(head: bytes) -> None:
    found = detect_format(head + bytes(32))
    assert (found.format, found.verdict) == (SIGNATURES[head], "allowed")
    assert check_format("whatever.bin", head + bytes(32), 99) == (found.kind, found.format)


@pytest.mark.parametrize(
    "head", [b"%PDF-1", b"8BPS", b"%!PS", b"SIMPLE  =", b"PK\x03\x04", b"\x00\x00\x00\x18ftypheic", bytes(257) + b"ustar"]
)
def test_unsupported_formats_are_rejected_under_any_name(head: bytes) -> None:
    for name in ("x.jpg", "x.wav", "x"):
        with pytest.raises(RejectedItemError) as error:
            check_format(name, head, 1000)
        assert error.value.code == "FORMAT_NOT_ALLOWED"


@given(st.text(max_size=20), st.binary(max_size=600))
def test_any_content_is_accepted_or_rejected_with_a_code(name: str, head: bytes) -> None:
    try:
        answer = check_format(name, head, len(head))[0]
    except RejectedItemError as error:
        answer = error.code
    assert answer in {"image", "audio", *CODES}


def test_other_files_are_no_candidates() -> None:
    assert not is_candidate("LICENSE", b"Apache License")
    assert not is_candidate("notes.txt", b"\xff\xfe\x68\x00i\x00")  # UTF-16 starts like an MPEG frame
    assert not is_candidate("table.csv", b"a,b\n")
    assert is_candidate("unnamed", b"\x89PNG\r\n\x1a\n")
    assert is_candidate("x.JPG", b"<html>")
    assert is_candidate("x.psd", b"")


def test_extensions() -> None:
    assert extension("a.b/c.JPG") == "jpg"
    assert extension("a.b/c") == ""
    assert kind_from_extension("x.opus") == "audio"
    assert kind_from_extension("x.heic") == "image"
    assert kind_from_extension("x.zip") == "unknown"
    assert has_wrong_extension("x.jpg", "PNG")
    assert not has_wrong_extension("x.opus", "OGG/Opus")
    assert not has_wrong_extension("x.dat", "PNG")


def test_unknown_reason_code() -> None:
    with pytest.raises(ValueError, match="unknown quarantine code"):
        RejectedItemError("NO_SUCH_CODE", "")
