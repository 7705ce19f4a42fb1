from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline_steps.ingest.decoding.truncation import find_truncation

FORMS = ["WEBP", "PNG", "GIF", "JPEG"]


def complete_file(form: str) -> bytes:
    buffer = io.BytesIO()
    generator = np.random.default_rng(1)
    Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


COMPLETE = {form: complete_file(form) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_complete_files(form: str) -> None:
    assert find_truncation(io.BytesIO(COMPLETE[form]), form) is None


@pytest.mark.parametrize("form", FORMS)
@given(fraction=st.floats(0.3, 0.97))
def test_truncated_files(form: str, fraction: float) -> None:
    payload = COMPLETE[form][: int(len(COMPLETE[form]) * fraction)]
    found = find_truncation(io.BytesIO(payload), form)
    if form in {"GIF", "JPEG"} and found is None:
        # The end marker may occur by chance before the cut; the decoder then decides.
        assert payload.rstrip(b"\x00").endswith(b"\x3b") if form == "GIF" else b"\xff\xd9" in payload
        return
    assert found is not None
    if form == "WEBP":
        assert found.missing == pytest.approx(len(COMPLETE[form]) - len(payload), abs=1)


@given(st.sampled_from(FORMS), st.binary(max_size=400), st.booleans())
def test_any_bytes_are_checked_without_an_error(form: str, tail: bytes, keep_head: bool) -> None:
    handle = io.BytesIO((COMPLETE[form][:60] if keep_head else b"") + tail)
    find_truncation(handle, form)
    assert handle.tell() == 0
