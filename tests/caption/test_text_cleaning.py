"""Events of any captioner are cleaned."""

from __future__ import annotations

from pipeline_steps.caption.captioners.base import SoundEvent
from pipeline_steps.caption.text_cleaning import clean_events


def test_events_without_a_phrase_and_repeats_are_left_out() -> None:
    events = [
        SoundEvent("\x00", "dog", True, 0.5, 0.5),
        SoundEvent("Dog barking", "dog", True, 1.5, float("nan")),
        SoundEvent("dog barking", "dog", True, 0.5, 0.5),
    ]
    assert clean_events(events, 60) == [SoundEvent("Dog barking", "dog", True, 1.0, 0.0)]
