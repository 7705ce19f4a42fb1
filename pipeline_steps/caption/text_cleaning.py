"""Cleaning of phrases: captions are untrusted text that later appears in terminals, tables and web pages."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from pipeline_steps.caption.captioners.base import SoundEvent


def clean_phrase(text: str, max_chars: int) -> str:
    """Normalize `text` to NFC with single spaces, without characters of category C, in at most `max_chars` characters.

    Category C has control, format (bidirectional), surrogate and unassigned characters. Leading `=`, `+`, `-` and `@` are
    removed, because spreadsheets interpret them as formulas.
    """
    normal = unicodedata.normalize("NFC", " ".join(text[: 16 * max_chars].split()))
    kept = "".join(character for character in normal if unicodedata.category(character)[0] != "C")
    return " ".join(kept.split()).lstrip("=+-@ ")[:max_chars].strip()


def clean_events(events: Iterable[SoundEvent], max_chars: int) -> list[SoundEvent]:
    """Clean phrases, drop events with an empty or repeated phrase, and clamp numbers to 0..1."""
    result: list[SoundEvent] = []
    used: set[str] = set()
    for event in events:
        phrase, source = clean_phrase(event.phrase, max_chars), clean_phrase(event.sound_source, max_chars)
        if not phrase or phrase.casefold() in used:
            continue
        used.add(phrase.casefold())
        result.append(SoundEvent(phrase, source, bool(event.visible), _clamp(event.salience), _clamp(event.confidence)))
    return result


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, float(value))) if value == value else 0.0
