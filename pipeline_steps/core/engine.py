"""Where the items of a stage are worked off: in this process or by actors of a Ray cluster. The memo takes the results.

A stage gives a `Work`: a model that it loads once, and a generator from ids to results. `finish` drives it. Whoever computes
a result appends it to the memo at once, so a killed process, actor or node loses what it had in hand and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.memo import Memo

log = logging.getLogger(__name__)

FLUSH_SECONDS = 1.0
"""Longest time that a result waits for others before all of them go to the memo as one part."""

Engine = Literal["local", "ray"]

Failure = tuple[str, str]
"""Code of the quarantine and one line that says why an item has no result."""

Result = Mapping[str, Any] | Failure
"""A row of the memo, or why there is none."""


class Ray(StageConfig):
    """Group `ray`: the cluster that works for `engine: ray`, and what an actor of it gets."""

    address: str = Field(
        default="",
        pattern=r"^(|auto|[A-Za-z0-9_.\-]+:[0-9]{1,5})$",
        description="auto: this machine's cluster; HOST:PORT of a head; empty: a Ray of this machine for the stage alone",
    )
    min_actors: int = Field(default=1, ge=1, le=10_000, description="actors kept from the start, each with its own model")
    max_actors: int = Field(default=8, ge=1, le=10_000, description="actors at most, as far as the cluster has room")
    cpus_per_actor: float = Field(default=1.0, ge=0, le=1024, description="processors reserved for an actor")
    gpus_per_actor: float = Field(default=0.0, ge=0, le=64, description="GPUs reserved for an actor; 0.25: four share one")
    patience_seconds: float = Field(
        default=1800.0, ge=1, le=604_800, description="without any finished batch for so long, the stage stops"
    )

    @model_validator(mode="after")
    def _whole(self) -> Ray:
        if self.min_actors > self.max_actors:
            raise ValueError("ray.min_actors is above ray.max_actors")
        for name in ("cpus_per_actor", "gpus_per_actor"):
            if (amount := getattr(self, name)) > 1 and amount != int(amount):
                raise ValueError(f"ray.{name} above 1 must be a whole number")
        if not self.cpus_per_actor and not self.gpus_per_actor:
            raise ValueError("ray: an actor needs processors or GPUs: set cpus_per_actor or gpus_per_actor")
        return self


class Work(Protocol):
    """What a stage does with items. It is pickled before `load`, so it must hold settings and no model until then."""

    memo: Memo

    def describe(self) -> Any:
        """Everything but the item that shapes a result; its fingerprint is the memo's."""
        ...

    def load(self) -> None:
        """Load the model and open the media, once in each process that works."""
        ...

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        """One result an id, in any order, as they come.

        Raises:
            StageError: what stops the whole stage.
        """
        ...


@dataclass
class Finished:
    """What became of the ids: rows computed in this process, ids whose rows others wrote to the memo, failures by id."""

    rows: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    remembered: list[str] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)


def remember(work: Work, ids: Sequence[str], part: int) -> Iterator[tuple[str, Result]]:
    """Results of `work`, their rows put into the memo in parts of up to `part` as they come, also when stopped."""
    pending: dict[str, Mapping[str, Any]] = {}
    since = 0.0
    try:
        for key, result in work.results(ids):
            if not isinstance(result, tuple):
                since = since if pending else time.monotonic()
                pending[key] = result
            yield key, result
            if len(pending) >= part or (pending and time.monotonic() - since > FLUSH_SECONDS):
                work.memo.append(pending)
                pending = {}
    finally:
        work.memo.append(pending)


def finish(work: Work, ids: Sequence[str], batch_size: int, engine: Engine = "local", ray: Ray | None = None) -> Finished:
    """Work off `ids`, none of which the memo knows.

    Args:
        work: what to do with them.
        ids: items, in the order in which `local` takes them.
        batch_size: rows of a memo part; with `ray` also the ids that an actor is given at a time.
        engine: `local` or `ray`.
        ray: settings of the cluster; None: the defaults.

    Raises:
        StageError: from the work itself; finished items are in the memo.
        ConfigError: `ray` is not installed, or an actor cannot do the work as this process would.
        ResourceError, ServiceError: no room for one actor; the cluster is away or came to a halt.
    """
    done = Finished()
    outcomes: Iterator[tuple[str, Result | None]]
    if not ids:
        return done
    if engine == "ray":
        from pipeline_steps.core.ray_engine import stream

        outcomes = stream(work, ids, batch_size, ray or Ray())
    else:
        work.load()
        outcomes = remember(work, ids, batch_size)
    reported = time.monotonic()
    for count, (key, result) in enumerate(outcomes, 1):
        if isinstance(result, tuple):
            done.failed[key] = result
        elif result is None:
            done.remembered.append(key)
        else:
            done.rows[key] = result
        if time.monotonic() - reported > FLUSH_SECONDS or count == len(ids):
            reported = time.monotonic()
            log.info("%d of %d new items done", count, len(ids))
    return done
