"""Where the items of a stage are worked off: in this process or by actors of a Ray cluster. The memo takes the results.

A stage gives a `Work`: a model that it loads once, and a generator from ids to results. `finish` drives it. Whoever computes
a result appends it to the memo at once, so a killed process, actor or node loses what it had in hand and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.result_cache import ResultCache

log = logging.getLogger(__name__)


ExecutorName = Literal["local", "ray"]

Failure = tuple[str, str]
"""Code of the quarantine and one line that says why an item has no result."""

Result = Mapping[str, Any] | Failure
"""A row of the memo, or why there is none."""


class RayConfig(StageConfig):
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
    no_progress_timeout_seconds: float = Field(
        default=1800.0, ge=1, le=604_800, description="without any finished batch for so long, the stage stops"
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


class ItemProcessor(Protocol):
    """What a stage does with items. It is pickled before `load`, so it must hold settings and no model until then."""

    cache: ResultCache

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
