"""What a vision-language model heard in a picture, and how it becomes a caption. Shared by `vlm` and `endpoint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline_steps.caption.captioners.base import CaptionResult, EventSelection
from pipeline_steps.caption.captioners.prompt import PredictedEvent, verify_prompt
from pipeline_steps.models.base import SoundEvent

FAR = "in the distance"
_FAR_WORDS = ("distan", "far away", "faint", "afar", "far-off")


@dataclass(frozen=True, slots=True)
class VlmResponse:
    """Events in the model's order, who answered (as a server names itself), and how many tries it took."""

    heard: tuple[PredictedEvent, ...]
    model: str
    tries: int = 1


@dataclass(frozen=True, slots=True)
class VlmPromptOptions:
    """How a model is asked. All but `min_verified` shape the answer and are part of the memo's fingerprint.

    Attributes:
        max_events: events it may list.
        max_new: tokens of an answer.
        verify: whether the second question is asked for each event.
        min_verified: probability of yes below which an event is dropped; judged afterwards.
    """

    max_events: int = 5
    max_new: int = 400
    verify: bool = False
    min_verified: float = 0.5


MEMO_SCHEMA = pa.schema(
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


_SHARES = ("salience", "likelihood", "verified")


def response_to_row(answer: VlmResponse) -> dict[str, Any]:
    """The answer as a row of the memo."""
    columns = {field.name: [getattr(heard, field.name) for heard in answer.heard] for field in fields(PredictedEvent)}
    return {**columns, "model": answer.model, "tries": answer.tries}


def row_to_response(row: Mapping[str, Any]) -> VlmResponse:
    """The answer that `answer_row` wrote, the same whether the row comes from the model or from the memo."""
    columns = [
        [_share(value) if field.name in _SHARES else value for value in row[field.name]] for field in fields(PredictedEvent)
    ]
    return VlmResponse(tuple(PredictedEvent(*values) for values in zip(*columns, strict=True)), row["model"], row["tries"])


def _share(value: float | None) -> float | None:
    """A share as the memo's float32 keeps it, to the digits that survive there: 0.7 is 0.7 again and reaches a floor of 0.7."""
    return None if value is None else round(float(np.float32(value)), 6)


def phrase_with_distance(heard: PredictedEvent) -> str:
    """The event's phrase; one that is far away says so, since a text-audio space hears the difference."""
    if heard.near or any(word in heard.sound.lower() for word in _FAR_WORDS):
        return heard.sound
    return f"{heard.sound} {FAR}"


def select_events(answer: VlmResponse, rules: EventSelection, min_verified: float) -> CaptionResult:
    """An answer -> the picture's caption: the events likely enough, or why there is none.

    Confidence is the probability of a yes to the second question where it was asked, the model's own likelihood otherwise.
    """
    if not answer.heard:
        return CaptionResult((), "NO_SOUND", "the model lists no sound", 0.0)
    events: list[SoundEvent] = []
    doubted: list[SoundEvent] = []
    for heard in answer.heard:
        confidence = heard.likelihood if heard.verified is None else heard.verified
        event = SoundEvent(phrase_with_distance(heard), heard.source, heard.visible, heard.salience, confidence)
        (doubted if heard.verified is not None and heard.verified < min_verified else events).append(event)
    ordered = sorted(events, key=lambda event: -event.salience * event.confidence)  # stable: ties keep the model's order
    score = max((event.confidence for event in [*ordered, *doubted]), default=0.0)
    if not ordered:
        first = doubted[0]
        reason = f"the second question answered no: {first.sound} {first.confidence:.2f}"
        return CaptionResult((), "NOT_VERIFIED", reason, score, tuple(doubted))
    floor = rules.min_share * ordered[0].salience * ordered[0].confidence
    kept = tuple(event for event in ordered if event.salience * event.confidence >= floor)[: rules.max_events]
    if score > 0 and any(event.confidence >= rules.min_confidence for event in kept):
        return CaptionResult(kept, "", "", score)
    top = ", ".join(f"{event.sound} {event.confidence:.2f}" for event in kept[:3])
    reason = f"no sound is likely enough (best {score:.2f} of {rules.min_confidence:.2f}): {top}"
    return CaptionResult((), "LOW_CONFIDENCE", reason, score, kept)


def with_verification(answer: VlmResponse, chances: Sequence[float]) -> VlmResponse:
    """The answer with the probabilities of yes to `questions(answer)`, in their order."""
    pairs = zip(answer.heard, chances, strict=True)
    return replace(answer, heard=tuple(replace(heard, verified=chance) for heard, chance in pairs))


def verification_prompts(answer: VlmResponse) -> list[str]:
    """The second question for each event of an answer."""
    return [verify_prompt(heard.sound) for heard in answer.heard]
