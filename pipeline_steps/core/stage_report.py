"""Report of a stage: item counts, time and metrics. A report whose counts do not add up is an error."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.errors import DataError


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
