"""Executors: process the items of a stage in this process or on Ray actors, and write results to the cache.

A stage implements `ItemProcessor`: a model that is loaded once, and a generator from ids to results. `run_items` runs it. The
process that computes a result appends it to the cache at once, so a killed process, actor or node loses only unfinished items.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.stage_report import accepted_failures

ExecutorName = Literal["local", "ray"]

Failure = tuple[str, str]
"""Quarantine code of an item without a result, and the reason in one line."""

Result = Mapping[str, Any] | Failure
"""A cache row, or the failure."""


class RayConfig(StageConfig):
    """Group `ray`: address and actors of executor `ray`."""

    address: str = Field(
        default="",
        pattern=r"^(|auto|[A-Za-z0-9_.\-]+:[0-9]{1,5})$",
        description="auto: cluster of this machine; HOST:PORT of a head node; empty: a temporary local Ray",
    )
    min_actors: int = Field(default=1, ge=1, le=10_000, description="smallest number of actors; each loads its own model")
    max_actors: int = Field(
        default=8, ge=1, le=10_000, description="largest number of actors, as far as the cluster has resources"
    )
    cpus_per_actor: float = Field(default=1.0, ge=0, le=1024, description="processors reserved for an actor")
    gpus_per_actor: float = Field(default=0.0, ge=0, le=64, description="GPUs reserved for an actor; 0.25: four actors per GPU")
    no_progress_timeout_seconds: float = Field(
        default=1800.0, ge=1, le=604_800, description="time without a finished batch after which the stage stops, in seconds"
    )

    @model_validator(mode="after")
    def _whole(self) -> RayConfig:
        if self.min_actors > self.max_actors:
            raise ValueError("ray.min_actors is above ray.max_actors")
        for name in ("cpus_per_actor", "gpus_per_actor"):
            if (amount := getattr(self, name)) > 1 and amount != int(amount):
                raise ValueError(f"ray.{name} above 1 must be a whole number")
        if not self.cpus_per_actor and not self.gpus_per_actor:
            raise ValueError("ray: an actor needs processors or GPUs: set cpus_per_actor or gpus_per_actor")
        return self


MAX_FAILURES_WITHOUT_SUCCESS = 32
"""Failures without one success after which a stage stops: the cause is then the model or the parameters, not the items."""


class ItemStageConfig(StageConfig):
    """Parameters shared by the stages that process items through an executor."""

    max_failed_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="quarantined fraction above which the stage fails; up to 5 items pass, of at most half; 0: none",
    )
    cache_dir: str = Field("", max_length=1000, description="folder or fsspec URL of the result cache; empty: .cache/items")
    executor: ExecutorName = Field("local", description="`local`: this process; `ray`: actors of a Ray cluster")
    ray: RayConfig = RayConfig()

    def failure_limit(self, total: int, cached: int) -> int:
        """Failures without one success that `run_items` accepts.

        Args:
            total: items of the stage.
            cached: items whose result is in the cache. With these the model is known to work, so the new items may be the
                failed fraction that is accepted.
        """
        accepted = accepted_failures(total, self.max_failed_fraction) if cached or self.max_failed_fraction == 1 else 0
        return max(MAX_FAILURES_WITHOUT_SUCCESS, accepted)


class ItemProcessor(Protocol):
    """Work of a stage on its items. It is pickled before `load`, so until then it must contain no model."""

    cache: ResultCache

    def describe(self) -> Any:
        """Everything except the item that determines a result; its fingerprint is that of the cache."""

    def load(self) -> None:
        """Load the model and open the media, once per worker process."""

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        """One result per id, in any order.

        Raises:
            StageError: an error that stops the stage.
        """


FLUSH_SECONDS = 1.0
"""Longest time that a result waits before the pending results are written as one cache part."""


def process_and_cache(work: ItemProcessor, ids: Sequence[str], part: int) -> Generator[tuple[str, Result], None, None]:
    """Yield the results of `work`; append rows to the cache in parts of up to `part`, also when interrupted."""
    pending: dict[str, Mapping[str, Any]] = {}
    since = 0.0
    try:
        for key, result in work.results(ids):
            if not isinstance(result, tuple):
                since = since if pending else time.monotonic()
                pending[key] = result
            yield key, result
            if len(pending) >= part or (pending and time.monotonic() - since > FLUSH_SECONDS):
                work.cache.append(pending)
                pending = {}
    finally:
        work.cache.append(pending)
