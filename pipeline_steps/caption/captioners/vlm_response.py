"""Responses of vision-language models: cache rows, selection of events, and the base class of generative captioners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline_steps.caption.captioners.base import Captioner, CaptionResult, EventSelection, SoundEvent
from pipeline_steps.caption.captioners.prompt import (
    PROMPT_VERSION,
    UNKNOWN,
    PredictedEvent,
    caption_prompt,
    parse_response,
    parse_space,
    response_schema,
    verify_prompt,
)

FAR = "far"
DISTANT = "in the distance"
_DISTANCE_WORDS = ("distan", "far away", "faint", "afar", "far-off")


@dataclass(frozen=True, slots=True)
class VlmResponse:
    """Events in the order of the model, its name as a server reports it, number of attempts, and space of the image."""

    events: tuple[PredictedEvent, ...]
    model: str
    attempts: int = 1
    space: str | None = None


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
SPACE_RESPONSE_SCHEMA = pa.schema(
    [*RESPONSE_SCHEMA, pa.field("distance", pa.list_(pa.string())), pa.field("space", pa.string())]
)
"""Columns with `describe_space`."""
_FLOAT_COLUMNS = ("salience", "likelihood", "verified")


def response_to_row(response: VlmResponse) -> dict[str, Any]:
    """Convert a response to a row of `SPACE_RESPONSE_SCHEMA`, which has the columns of `RESPONSE_SCHEMA` too."""
    columns = {field.name: [getattr(event, field.name) for event in response.events] for field in fields(PredictedEvent)}
    near = [event.distance != FAR for event in response.events]
    return {**columns, "near": near, "model": response.model, "tries": response.attempts, "space": response.space}


def row_to_response(row: Mapping[str, Any]) -> VlmResponse:
    """Convert a row of either schema, new or cached, to the response."""
    row = {"distance": ["near" if near else FAR for near in row["near"]], "space": None, **row}
    columns = [
        [_round_float32(value) if field.name in _FLOAT_COLUMNS else value for value in row[field.name]]
        for field in fields(PredictedEvent)
    ]
    events = tuple(PredictedEvent(*values) for values in zip(*columns, strict=True))
    return VlmResponse(events, row["model"], row["tries"], row["space"])


def _round_float32(value: float | None) -> float | None:
    """Round to the digits that survive the cache's float32, so that a cached 0.7 still reaches a threshold of 0.7."""
    return None if value is None else round(float(np.float32(value)), 6)


def phrase_with_distance(event: PredictedEvent) -> str:
    """Phrase of an event; "in the distance" is appended to distant ones, because text-audio encoders distinguish it."""
    if event.distance != FAR or any(word in event.sound.lower() for word in _DISTANCE_WORDS):
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
        distance = None if event.distance == UNKNOWN else event.distance
        phrase = phrase_with_distance(event)
        target.append(SoundEvent(phrase, event.source, event.visible, event.salience, confidence, distance))
    ordered = sorted(accepted, key=lambda event: -event.weight)  # stable: ties keep the order of the model
    score = max((event.confidence for event in [*ordered, *rejected]), default=0.0)
    if not ordered:
        first = rejected[0]
        reason = f"the second question answered no: {first.phrase} {first.confidence:.2f}"
        return CaptionResult((), "NOT_VERIFIED", reason, score, tuple(rejected))
    min_weight = selection.min_relative_weight * ordered[0].salience * ordered[0].confidence
    kept = tuple(event for event in ordered if event.weight >= min_weight)[: selection.max_events]
    if score > 0 and any(event.confidence >= selection.min_confidence for event in kept):
        return CaptionResult(kept, "", "", score, space=response.space)
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

    text_input = "optional"

    @property
    def schema(self) -> pa.Schema:
        """Columns of a cached response."""
        return SPACE_RESPONSE_SCHEMA if self.options.prompt.describe_space else RESPONSE_SCHEMA

    @property
    def response_schema(self) -> dict[str, Any]:
        """JSON schema of a response."""
        return response_schema(self.options.selection.max_events, self.options.prompt.describe_space)

    def prompt(self, words: str = "", parse_error: str = "") -> str:
        """Prompt for an image and the untrusted words that came with it; `parse_error` is that of the previous response."""
        return caption_prompt(self.options.selection.max_events, parse_error, self.options.prompt.describe_space, words)

    def parse(self, text: str, model: str, attempts: int = 1) -> VlmResponse:
        """Parse the text of a response.

        Raises:
            ResponseParseError: it has no list of events that matches the schema.
        """
        events = parse_response(text, self.options.selection.max_events)
        return VlmResponse(events, model, attempts, parse_space(text) if self.options.prompt.describe_space else None)

    def describe_prompt(self) -> dict[str, Any]:
        """Prompt and its options; part of the fingerprint of the cache."""
        count, prompt = self.options.selection.max_events, self.options.prompt
        text = self.prompt("x") if self.options.use_text else self.prompt()
        return {
            "asking": [count, prompt.max_new_tokens, prompt.verify_events],
            "prompt": {"version": PROMPT_VERSION, "text": text},
        }

    def describe_selection(self) -> dict[str, Any]:
        return {"rules": [*super().describe_selection()["rules"], self.options.prompt.min_yes_probability]}

    def to_row(self, prediction: VlmResponse) -> dict[str, Any]:
        row = response_to_row(prediction)
        return {name: row[name] for name in self.schema.names}

    def from_row(self, row: Mapping[str, Any]) -> VlmResponse:
        return row_to_response(row)

    def caption(self, prediction: VlmResponse) -> CaptionResult:
        return select_response_events(prediction, self.options.selection, self.options.prompt.min_yes_probability)
