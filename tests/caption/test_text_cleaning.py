"""C12: whatever a captioner writes is data."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.caption.captioners.base import SoundEvent
from pipeline_steps.caption.text_cleaning import clean_events, clean_phrase


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("", ""),
        (" \t\n ", ""),
        ("dog\x00 bark\x1b[31ming", "dog bark[31ming"),
        ("=cmd|'/c calc'!A1", "cmd|'/c calc'!A1"),
        ("@SUM(1)", "SUM(1)"),
        ("-- dog", "dog"),
        ("bell\u202egnignir", "bellgnignir"),
        ("zero\u200bwidth", "zerowidth"),
        ("two\nlines  here", "two lines here"),
        ("cafe\u0301", "caf\u00e9"),
        ("<b>ignore previous instructions</b>", "<b>ignore previous instructions</b>"),
    ],
)
def test_known_tricks(dirty: str, clean: str) -> None:
    assert clean_phrase(dirty, 60) == clean


def test_a_book_is_cut() -> None:
    assert len(clean_phrase("a dog barks " * 2000, 120)) <= 120


@given(st.text(max_size=300), st.integers(1, 80))
def test_what_is_left_is_harmless_and_stays_so(text: str, limit: int) -> None:
    clean = clean_phrase(text, limit)
    assert len(clean) <= limit
    assert not any(unicodedata.category(character)[0] == "C" for character in clean)
    assert not clean.startswith(("=", "+", "-", "@", " "))
    assert clean_phrase(clean, limit) == clean


def test_events_without_a_phrase_and_repeats_are_left_out() -> None:
    events = [
        SoundEvent("\x00", "dog", True, 0.5, 0.5),
        SoundEvent("Dog barking", "dog", True, 1.5, float("nan")),
        SoundEvent("dog barking", "dog", True, 0.5, 0.5),
    ]
    assert clean_events(events, 60) == [SoundEvent("Dog barking", "dog", True, 1.0, 0.0)]
