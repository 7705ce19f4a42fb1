"""Responses of vision-language models: cache rows, selection of events, and the base class of generative captioners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline_steps.caption.captioners.base import Captioner, CaptionResult, EventSelection, SoundEvent
from pipeline_steps.caption.captioners.prompt import PROMPT_VERSION, PredictedEvent, caption_prompt, verify_prompt

DISTANT = "in the distance"
_DISTANCE_WORDS = ("distan", "far away", "faint", "afar", "far-off")


@dataclass(frozen=True, slots=True)
class VlmResponse:
    """Events in the order of the model, the model's name as a server reports it, and the number of attempts."""

    events: tuple[PredictedEvent, ...]
    model: str
    attempts: int = 1


RESPONSE_SCHEMA = pa.schema(
    [
        pa.field("sound", pa.list_(pa.string())),
        pa.field("source", pa.list_(pa.string())),
        pa.field("visible", pa.list_(pa.bool_())),
        pa.field("near", pa.list_(pa.bool_())),
        pa.field("salience", pa.list_(pa.float32())),
        pa.field("likelihood", pa.list_(pa.float32())),
        pa.field("verified", pa.list_(pa.float32())),
        pa.field("model", pa.string()),
        pa.field("tries", pa.int32()),
    ]
)
_FLOAT_COLUMNS = ("salience", "likelihood", "verified")


def response_to_row(response: VlmResponse) -> dict[str, Any]:
    """Convert a response to a row of `RESPONSE_SCHEMA`."""
    columns = {field.name: [getattr(event, field.name) for event in response.events] for field in fields(PredictedEvent)}
    return {**columns, "model": response.model, "tries": response.attempts}


def row_to_response(row: Mapping[str, Any]) -> VlmResponse:
    """Convert a row of `RESPONSE_SCHEMA`, new or cached, to the response."""
    columns = [
        [_round_float32(value) if field.name in _FLOAT_COLUMNS else value for value in row[field.name]]
        for field in fields(PredictedEvent)
    ]
    return VlmResponse(tuple(PredictedEvent(*values) for values in zip(*columns, strict=True)), row["model"], row["tries"])


def _round_float32(value: float | None) -> float | None:
    """Round to the digits that survive the cache's float32, so that a cached 0.7 still reaches a threshold of 0.7."""
    return None if value is None else round(float(np.float32(value)), 6)


def phrase_with_distance(event: PredictedEvent) -> str:
    """Phrase of an event; "in the distance" is appended to distant ones, because text-audio encoders distinguish it."""
    if event.near or any(word in event.sound.lower() for word in _DISTANCE_WORDS):
        return event.sound
    return f"{event.sound} {DISTANT}"


def select_response_events(response: VlmResponse, selection: EventSelection, min_yes_probability: float) -> CaptionResult:
    """Select the events of a response, or abstain with a reason.

    The confidence of an event is its probability of yes where events were verified, else the model's likelihood.
    """
    if not response.events:
        return CaptionResult((), "NO_SOUND", "the model lists no sound", 0.0)
    accepted: list[SoundEvent] = []
    rejected: list[SoundEvent] = []
    for event in response.events:
        confidence = event.likelihood if event.verified is None else event.verified
        target = rejected if event.verified is not None and event.verified < min_yes_probability else accepted
        target.append(SoundEvent(phrase_with_distance(event), event.source, event.visible, event.salience, confidence))
    ordered = sorted(accepted, key=lambda event: -event.weight)  # stable: ties keep the order of the model
    score = max((event.confidence for event in [*ordered, *rejected]), default=0.0)
    if not ordered:
        first = rejected[0]
        reason = f"the second question answered no: {first.phrase} {first.confidence:.2f}"
        return CaptionResult((), "NOT_VERIFIED", reason, score, tuple(rejected))
    min_weight = selection.min_relative_weight * ordered[0].salience * ordered[0].confidence
    kept = tuple(event for event in ordered if event.weight >= min_weight)[: selection.max_events]
    if score > 0 and any(event.confidence >= selection.min_confidence for event in kept):
        return CaptionResult(kept, "", "", score)
    top = ", ".join(f"{event.phrase} {event.confidence:.2f}" for event in kept[:3])
    reason = f"no sound is likely enough (best {score:.2f} of {selection.min_confidence:.2f}): {top}"
    return CaptionResult((), "LOW_CONFIDENCE", reason, score, kept)


def with_verification(response: VlmResponse, yes_probabilities: Sequence[float]) -> VlmResponse:
    """Add the probabilities of yes to `verification_prompts(response)`, in their order."""
    pairs = zip(response.events, yes_probabilities, strict=True)
    return replace(response, events=tuple(replace(event, verified=probability) for event, probability in pairs))


def verification_prompts(response: VlmResponse) -> list[str]:
    """Yes-or-no question for each event of a response."""
    return [verify_prompt(event.sound) for event in response.events]


class GenerativeCaptioner(Captioner[VlmResponse]):
    """Base class of captioners that prompt a vision-language model for sound events."""

    schema = RESPONSE_SCHEMA

    def describe_prompt(self) -> dict[str, Any]:
        """Prompt and its options; part of the fingerprint of the cache."""
        count, prompt = self.options.selection.max_events, self.options.prompt
        return {
            "asking": [count, prompt.max_new_tokens, prompt.verify_events],
            "prompt": {"version": PROMPT_VERSION, "text": caption_prompt(count)},
        }

    def describe_selection(self) -> dict[str, Any]:
        return {"rules": [*super().describe_selection()["rules"], self.options.prompt.min_yes_probability]}

    def to_row(self, prediction: VlmResponse) -> dict[str, Any]:
        return response_to_row(prediction)

    def from_row(self, row: Mapping[str, Any]) -> VlmResponse:
        return row_to_response(row)

    def caption(self, prediction: VlmResponse) -> CaptionResult:
        return select_response_events(prediction, self.options.selection, self.options.prompt.min_yes_probability)
