"""Hygiene of captions: whoever wrote them, they are data and must not steer a terminal, a table or a page."""

from __future__ import annotations

import unicodedata

from pipeline_steps.models.base import SoundEvent


def clean_phrase(text: str, limit: int) -> str:
    """`text` in NFC, white space collapsed, no control, format (bidi), surrogate or unassigned characters, cut to `limit`.

    A leading `=`, `+`, `-` or `@` is removed: spreadsheets take it for a formula.
    """
    normal = unicodedata.normalize("NFC", " ".join(text[: 16 * limit].split()))
    kept = "".join(character for character in normal if unicodedata.category(character)[0] != "C")
    return " ".join(kept.split()).lstrip("=+-@ ")[:limit].strip()


def clean_events(events: list[SoundEvent] | tuple[SoundEvent, ...], limit: int) -> list[SoundEvent]:
    """Events with clean phrases; those whose phrase is empty or said before are left out, numbers are clamped to 0..1."""
    result: list[SoundEvent] = []
    said: set[str] = set()
    for event in events:
        sound, source = clean_phrase(event.sound, limit), clean_phrase(event.source, limit)
        if not sound or sound.casefold() in said:
            continue
        said.add(sound.casefold())
        result.append(SoundEvent(sound, source, bool(event.visible), _clamp(event.salience), _clamp(event.confidence)))
    return result


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, float(value))) if value == value else 0.0
