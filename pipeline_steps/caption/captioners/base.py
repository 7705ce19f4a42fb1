"""Captions, and the interface that stage `caption` expects of a captioner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from pipeline_steps.caption.captioners.prompt import CaptionFailure
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.models.base import SoundEvent


@dataclass(frozen=True, slots=True)
class CaptionResult:
    """What the captioner says of one picture: events, or the reason why there is none.

    Attributes:
        events: most prominent first; empty when the captioner abstains.
        code: "" or NO_SOUND (what is seen is silent) or LOW_CONFIDENCE (nothing is recognised well enough).
        reason: one line for people, naming the top labels.
        score: confidence of the best event considered, also when it was too low.
        guesses: events that were not likely enough, for a person who asks all the same; never paired.
    """

    events: tuple[SoundEvent, ...]
    code: str
    reason: str
    score: float
    guesses: tuple[SoundEvent, ...] = ()


@dataclass(frozen=True, slots=True)
class EventSelection:
    """How tags become events.

    Attributes:
        max_events: events kept per picture.
        min_confidence: a picture abstains unless one of its events reaches it.
        min_share: a further event whose weight (salience x confidence) is below this share of the best one's is dropped.
    """

    max_events: int = 5
    min_confidence: float = 0.15
    min_share: float = 0.1


Seen = TypeVar("Seen")


class CaptionBackend(Protocol[Seen]):
    """What the stage asks of a captioner. `Seen` is what one look at a picture gives, before any rule of taste."""

    schema: pa.Schema

    @property
    def families(self) -> tuple[str, ...]: ...

    def load(self) -> None: ...

    def describe_looks(self) -> dict[str, Any]:
        """Everything but the picture that shapes what is seen: the memo's fingerprint."""
        ...

    def describe(self) -> dict[str, Any]:
        """`describe_looks` and the rules that make a caption of it."""
        ...

    def stream(self, pictures: Iterable[tuple[str, ByteArray]]) -> Iterator[tuple[str, Seen | CaptionFailure]]:
        """What is seen in each named picture, in any order, as it comes."""
        ...

    def compose(self, seen: Seen) -> CaptionResult: ...

    def row(self, seen: Seen) -> dict[str, Any]: ...

    def seen(self, row: Mapping[str, Any]) -> Seen: ...
