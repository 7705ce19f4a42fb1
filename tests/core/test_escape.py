"""Untrusted text in Markdown, CSV, HTML pages and on terminals."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.core.escape import clean_text, escape_csv, escape_display, escape_markdown, escape_terminal


@given(st.text(max_size=80))
def test_markdown_is_one_line_without_markup(text: str) -> None:
    shown = escape_markdown(text)
    assert len(f"x{shown}x".splitlines()) == 1
    assert not {"<", ">"} & set(shown)
    assert "://" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[\]!*_]", shown)


@pytest.mark.parametrize("value", ["plain", "", -0.5, 3, True])
def test_csv_values_that_are_no_formulas_stay(value: object) -> None:
    assert escape_csv(value) == value


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\tb", "\rc", "\nd"])
def test_csv_formulas_are_quoted(text: str) -> None:
    assert escape_csv(text) == f"'{text}"


def test_terminal_sequences_are_escaped() -> None:
    assert escape_terminal("a\x1b[31m\u202eb\nc\td\udcff") == "a\\x1b[31m\\u202eb\nc\td\\udcff"


def test_display_is_short_and_has_no_control_characters() -> None:
    assert escape_display("a\x00\u202e") == "a\\u0000\\u202e"
    assert escape_display("abcdef", limit=4) == "abc\u2026"
    assert escape_display(None) == ""


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
    assert clean_text(dirty, 60) == clean


def test_a_book_is_cut() -> None:
    assert len(clean_text("a dog barks " * 2000, 120)) <= 120


@given(st.text(max_size=300), st.integers(1, 80))
def test_what_is_left_is_harmless_and_stays_so(text: str, limit: int) -> None:
    clean = clean_text(text, limit)
    assert len(clean) <= limit
    assert not any(unicodedata.category(character)[0] == "C" for character in clean)
    assert not clean.startswith(("=", "+", "-", "@", " "))
    assert clean_text(clean, limit) == clean
