from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.ingest.decoding.riff_chunks import finish_header, scan_chunks
from tests.factories.audio_streams import encode, noise, riff, wav_format

COMPLETE = {form: encode(noise(0.5)[:20_001], form, "PCM_16") for form in ("WAV", "AIFF")}
CODECS = {"WAV": "16-bit PCM", "AIFF": "AIFF 16-bit PCM"}


@pytest.mark.parametrize("form", COMPLETE)
def test_complete_files(form: str) -> None:
    scan = scan_chunks(io.BytesIO(COMPLETE[form]), form)
    assert (scan.truncation, scan.unfinished, scan.foreign_bytes, scan.codec) == ("", False, 0, CODECS[form])


@pytest.mark.parametrize("form", COMPLETE)
@given(fraction=st.floats(0.3, 0.97))
def test_truncated_files(form: str, fraction: float) -> None:
    scan = scan_chunks(io.BytesIO(COMPLETE[form][: int(len(COMPLETE[form]) * fraction)]), form)
    assert "declares" in scan.truncation
    assert not scan.impossible_header


@pytest.mark.parametrize("form", COMPLETE)
@given(st.binary(max_size=400), st.integers(0, 80))
def test_any_bytes_are_scanned(form: str, tail: bytes, keep: int) -> None:
    handle = io.BytesIO(COMPLETE[form][:keep] + tail)
    scan_chunks(handle, form)
    assert handle.tell() == 0


def test_odd_data_chunk_without_pad_byte_is_complete() -> None:
    payload = encode(np.zeros(101), "WAV", "PCM_U8", 8000)
    scan = scan_chunks(io.BytesIO(payload.rstrip(b"\x00") if payload.endswith(b"\x00") else payload), "WAV")
    assert scan.truncation == ""


@pytest.mark.parametrize("form", COMPLETE)
def test_finished_header_has_the_sizes_of_the_bytes(form: str) -> None:
    payload = bytearray(COMPLETE[form])
    place = payload.find(b"data" if form == "WAV" else b"SSND") + 4
    payload[4:8] = payload[place : place + 4] = bytes(4)
    scan = scan_chunks(io.BytesIO(bytes(payload)), form)
    assert scan.unfinished
    finished = finish_header(bytes(payload), scan, form)
    assert np.array_equal(soundfile.read(io.BytesIO(finished))[0], soundfile.read(io.BytesIO(COMPLETE[form]))[0])


def test_codec_of_an_extensible_format_is_that_of_its_guid() -> None:
    extra = b"\x16\x00" + bytes(6) + b"\x65\x00" + bytes(14)
    scan = scan_chunks(io.BytesIO(riff([(b"fmt ", wav_format(0xFFFE, 4, extra=extra)), (b"data", bytes(80))])), "WAV")
    assert scan.codec == "G.722"
