"""Executor `local`: process items in this process and write results to the cache."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from pipeline_steps.core.executors.base import ItemProcessor, Result

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
