"""Run a processor over the items of a stage, in this process or on Ray, and collect the results."""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from pipeline_steps.core.errors import DataError
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
    work: ItemProcessor,
    ids: Sequence[str],
    batch_size: int,
    engine: ExecutorName = "local",
    ray: RayConfig | None = None,
    failure_limit: int | None = None,
) -> RunResult:
    """Process `ids`, none of which is in the cache.

    Args:
        work: processor of the stage.
        ids: items, in the order in which `local` processes them.
        batch_size: rows per cache part; with `ray` also ids per actor call.
        engine: `local` or `ray`.
        ray: cluster settings; None: defaults.
        failure_limit: failures without one success that are accepted; None: any number.

    Raises:
        DataError: more items failed than `failure_limit`, and none succeeded.
        StageError: from the processor; finished items are in the cache.
        ConfigError: `ray` is not installed, or an actor would compute other results than this process.
        ResourceError, ServiceError: no resources for one actor; the cluster is unreachable or stopped.
    """
    done = RunResult()
    outcomes: Generator[tuple[str, Result | None], None, None]
    if not ids:
        return done
    if engine == "ray":
        from pipeline_steps.core.executors.ray import run_on_ray

        outcomes = run_on_ray(work, ids, batch_size, ray or RayConfig())
    else:
        work.load()
        outcomes = process_and_cache(work, ids, batch_size)
    reported = time.monotonic()
    with closing(outcomes):
        for count, (key, result) in enumerate(outcomes, 1):
            if isinstance(result, tuple):
                done.failed[key] = result
                if failure_limit is not None and len(done.failed) == count > failure_limit:
                    raise _all_failed_error(done.failed, len(ids))
            elif result is None:
                done.cached_ids.append(key)
            else:
                done.rows[key] = result
            if time.monotonic() - reported > FLUSH_SECONDS or count == len(ids):
                reported = time.monotonic()
                log.info("%d of %d new items done", count, len(ids))
    return done


def _all_failed_error(failed: Mapping[str, Failure], total: int) -> DataError:
    """Error with the most frequent reason; reasons that differ in numbers only count as one."""
    kinds = {key: (code, re.sub(r"\d+", "0", reason)) for key, (code, reason) in failed.items()}
    kind, count = Counter(kinds.values()).most_common(1)[0]
    code, reason = next(failure for key, failure in failed.items() if kinds[key] == kind)
    return DataError(
        f"the first {len(failed)} of {total} new items failed and none succeeded; "
        f"most frequent reason ({count} of {len(failed)}): {code}: {reason[:300]}",
        "correct the model or the parameters that the reason names, and run again",
    )
