"""Report of a stage: item counts, time and metrics. A report whose counts do not add up is an error."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.errors import DataError

MIN_ACCEPTED_FAILURES = 5


def accepted_failures(total: int, fraction: float) -> int:
    """Failed items that a stage accepts: `fraction` of all, or up to MIN_ACCEPTED_FAILURES if that is more.

    A small pool thus keeps a few bad files, but never more than half of it. A fraction of 0 accepts none.
    """
    return max(int(fraction * total), min(MIN_ACCEPTED_FAILURES, total // 2)) if fraction else 0


@dataclass
class StageReport:
    """Counts of items (n_in = n_ok + n_abstained + n_quarantined) and results of a stage.

    `metrics` is a function of the inputs. `runtime`, like the cache use, may differ from one execution to the next.
    """

    stage: str
    n_in: int = 0
    n_ok: int = 0
    n_abstained: int = 0
    n_quarantined: int = 0
    cache_misses: int = 0
    cache_hits: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def check_balance(self) -> None:
        """Raise DataError unless the counts of outcomes add up to `n_in`."""
        out = self.n_ok + self.n_abstained + self.n_quarantined
        if out != self.n_in:
            raise DataError(
                f"{self.stage} counts do not add up: {self.n_in} in, {self.n_ok} ok + {self.n_abstained} abstained "
                f"+ {self.n_quarantined} quarantined = {out}",
                "report this bug of the stage with the quarantine table",
            )

    def check_failures(
        self, max_failed_fraction: float, items: str, cause: str, action: str, details: Mapping[str, object] | None = None
    ) -> None:
        """Raise DataError when more items are quarantined than `accepted_failures`.

        Args:
            max_failed_fraction: the stage's parameter of this name.
            items: what the items are.
            cause: the most frequent or first reason.
            action: how to repair the items.
            details: for `error.json`.
        """
        accepted = accepted_failures(self.n_in, max_failed_fraction)
        if self.n_quarantined > accepted:
            key = f"{self.stage}.max_failed_fraction"
            raise DataError(
                f"{key}: {self.n_quarantined} of {self.n_in} {items} failed, and {max_failed_fraction:g} accepts {accepted} "
                f"({cause})",
                f"{action}, or raise {key}",
                details=dict(details or {}),
            )

    def write(self, path: Path, runtime_path: Path) -> None:
        """Check the balance; write the report, an out that is equal for equal inputs, and the figures of this execution."""
        self.check_balance()
        seconds = time.monotonic() - self.started
        execution = {
            "cache_misses": self.cache_misses,
            "cache_hits": self.cache_hits,
            "seconds": round(seconds, 3),
            "items_per_second": round(self.n_in / seconds, 3) if seconds else 0.0,
        }
        write_json(runtime_path, execution | self.runtime)
        counts = {name: getattr(self, name) for name in ("stage", "n_in", "n_ok", "n_abstained", "n_quarantined")}
        write_json(path, counts | self.metrics)

    def line(self) -> str:
        """One line for the terminal."""
        return (
            f"{self.stage}: {self.n_in} in = {self.n_ok} ok + {self.n_abstained} abstained + "
            f"{self.n_quarantined} quarantined; {self.cache_misses} cache misses, {self.cache_hits} cache hits; "
            f"{time.monotonic() - self.started:.1f} s"
        )
