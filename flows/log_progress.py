"""Progress of a stage parsed from its log lines, such as `step 182/1700` or `captioned 320 of 1700 images`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

_COUNT = re.compile(r"(?<![\w./:-])(\d+)(?: of |/)(\d+)(?![\w./:-]|\.\d)")


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """Progress of a stage: items done, total, items per second and remaining seconds (None before the second line)."""

    what: str
    done: int
    total: int
    rate: float | None
    left_s: float | None

    @property
    def percent(self) -> float:
        """Percentage done, 0 to 100."""
        return 100.0 * self.done / self.total

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total}"]
        if self.rate is not None and self.left_s is not None:
            parts += [f"{self.rate:.1f}/s" if self.rate >= 1 else f"{self.rate * 60:.1f}/min", f"{duration(self.left_s)} left"]
        return f"{self.what}: {', '.join(parts)}" if self.what else ", ".join(parts)


class ProgressParser:
    """Parses counts in log lines. A count with another total or other words begins a new series."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._series = ("", 0)
        self._first = (0, 0.0)

    def parse(self, line: str) -> ProgressUpdate | None:
        """Progress in this line; None if it contains no count."""
        found = _COUNT.search(line)
        if found is None:
            return None
        done, total = int(found[1]), int(found[2])
        if total < 1 or done > total:
            return None
        what = " ".join(line[: found.start()].split())[-60:]
        now = self._clock()
        if self._series != (what, total) or done < self._first[0]:
            self._series, self._first = (what, total), (done, now)
        done_since, seconds = done - self._first[0], now - self._first[1]
        if done_since <= 0 or seconds <= 0:
            return ProgressUpdate(what, done, total, None, None)
        rate = done_since / seconds
        return ProgressUpdate(what, done, total, rate, (total - done) / rate)


def duration(seconds: float) -> str:
    """Format seconds: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
