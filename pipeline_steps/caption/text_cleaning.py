"""Cleaning of phrases: captions are untrusted text that later appears in terminals, tables and web pages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from pipeline_steps.caption.captioners.base import SoundEvent
from pipeline_steps.core.escape import clean_text


def clean_events(events: Iterable[SoundEvent], max_chars: int) -> list[SoundEvent]:
    """Clean phrases, drop events with an empty or repeated phrase, and clamp numbers to 0..1."""
    result: list[SoundEvent] = []
    used: set[str] = set()
    for event in events:
        phrase, source = clean_text(event.phrase, max_chars), clean_text(event.sound_source, max_chars)
        if not phrase or phrase.casefold() in used:
            continue
        used.add(phrase.casefold())
        result.append(
            replace(
                event,
                phrase=phrase,
                sound_source=source,
                salience=_clamp(event.salience),
                confidence=_clamp(event.confidence),
            )
        )
    return result


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, float(value))) if value == value else 0.0
