"""Choice of the number of torch threads on a machine that other processes use too."""

import os
import time
from pathlib import Path

import torch

STAT = Path("/proc/stat")


def busy_seconds() -> float:
    """Return the processor time that all processes of the machine have used since it started, summed over its cores."""
    fields = [int(field) for field in STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, *interrupts = fields[:8]
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


class ThreadTuner:
    """Gives torch as many threads as there are cores that other processes leave free, at least one.

    A parallel region waits for its slowest thread, so a thread on a busy core costs more than it gives.
    A fixed number of threads keeps the order of floating-point sums: then a resumed run is equal bit by bit.

    Args:
        threads: fixed number of threads, or 0 to follow the load.
        seconds: time between two adjustments.
    """

    def __init__(self, threads: int, seconds: float = 5.0) -> None:
        self.cores = torch.get_num_threads()
        self.seconds = seconds
        self.adjusts = not threads and self.cores > 1 and STAT.exists()
        torch.set_num_threads(threads or (1 if self.adjusts else self.cores))
        self._mark()

    def _mark(self) -> None:
        if self.adjusts:
            self._time, self._busy, self._own = time.monotonic(), busy_seconds(), time.process_time()

    def step(self) -> None:
        """Call after every optimizer step."""
        elapsed = time.monotonic() - self._time if self.adjusts else 0.0
        if elapsed < self.seconds:
            return
        others = (busy_seconds() - self._busy - (time.process_time() - self._own)) / elapsed
        torch.set_num_threads(max(1, min(self.cores, int(self.cores - others + 0.6))))
        self._mark()
