"""Run a processor over the items of a stage, in this process or on Ray, and collect the results."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline_steps.core.executors.base import ExecutorName, Failure, ItemProcessor, RayConfig, Result
from pipeline_steps.core.executors.local import FLUSH_SECONDS, process_and_cache

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """Outcome by id: rows computed in this process, ids whose rows a worker wrote to the cache, failures."""

    rows: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    cached_ids: list[str] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)


def run_items(
    work: ItemProcessor, ids: Sequence[str], batch_size: int, engine: ExecutorName = "local", ray: RayConfig | None = None
) -> RunResult:
    """Process `ids`, none of which is in the cache.

    Args:
        work: processor of the stage.
        ids: items, in the order in which `local` processes them.
        batch_size: rows per cache part; with `ray` also ids per actor call.
        engine: `local` or `ray`.
        ray: cluster settings; None: defaults.

    Raises:
        StageError: from the processor; finished items are in the cache.
        ConfigError: `ray` is not installed, or an actor would compute other results than this process.
        ResourceError, ServiceError: no resources for one actor; the cluster is unreachable or stopped.
    """
    done = RunResult()
    outcomes: Iterator[tuple[str, Result | None]]
    if not ids:
        return done
    if engine == "ray":
        from pipeline_steps.core.executors.ray import run_on_ray

        outcomes = run_on_ray(work, ids, batch_size, ray or RayConfig())
    else:
        work.load()
        outcomes = process_and_cache(work, ids, batch_size)
    reported = time.monotonic()
    for count, (key, result) in enumerate(outcomes, 1):
        if isinstance(result, tuple):
            done.failed[key] = result
        elif result is None:
            done.cached_ids.append(key)
        else:
            done.rows[key] = result
        if time.monotonic() - reported > FLUSH_SECONDS or count == len(ids):
            reported = time.monotonic()
            log.info("%d of %d new items done", count, len(ids))
    return done
