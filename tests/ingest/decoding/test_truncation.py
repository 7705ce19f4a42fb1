from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline_steps.ingest.decoding.truncation import find_truncation

FORMS = ["WAV", "AIFF", "OGG", "WEBP", "PNG", "GIF", "BMP", "JPEG"]


def whole(form: str) -> bytes:
    buffer = io.BytesIO()
    generator = np.random.default_rng(1)
    if form in {"WAV", "AIFF", "OGG"}:
        subtype = "VORBIS" if form == "OGG" else "PCM_16"
        soundfile.write(buffer, generator.uniform(-0.5, 0.5, 20_001), 48_000, format=form, subtype=subtype)
    else:
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


WHOLE = {form: whole(form) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_whole_files_lack_nothing(form: str) -> None:
    assert find_truncation(io.BytesIO(WHOLE[form]), form) is None


@pytest.mark.parametrize("form", FORMS)
@given(share=st.floats(0.3, 0.97))
def test_cut_files_lack_something(form: str, share: float) -> None:
    payload = WHOLE[form][: int(len(WHOLE[form]) * share)]
    found = find_truncation(io.BytesIO(payload), form)
    if form in {"GIF", "JPEG"} and found is None:
        # Their end mark may stand by chance where they were cut; the decoder has the last word.
        assert payload.rstrip(b"\x00").endswith(b"\x3b") if form == "GIF" else b"\xff\xd9" in payload
        return
    assert found is not None
    assert not found.lies
    if form in {"WAV", "WEBP", "BMP"}:
        assert found.missing == pytest.approx(len(WHOLE[form]) - len(payload), abs=1)


@given(st.sampled_from(FORMS), st.binary(max_size=400), st.booleans())
def test_any_bytes_are_judged_without_an_error(form: str, tail: bytes, keep_head: bool) -> None:
    handle = io.BytesIO((WHOLE[form][:60] if keep_head else b"") + tail)
    find_truncation(handle, form)
    assert handle.tell() == 0


def test_an_odd_data_chunk_without_its_pad_byte_is_whole() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(101), 8000, format="WAV", subtype="PCM_U8")
    payload = buffer.getvalue()
    assert find_truncation(io.BytesIO(payload.rstrip(b"\x00") if payload.endswith(b"\x00") else payload), "WAV") is None
