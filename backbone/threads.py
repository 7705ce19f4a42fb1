"""Choice of the number of torch threads on a machine that other processes use too."""

import time

import torch


class ThreadTuner:
    """Picks the faster of one thread and all threads by timing steps, again and again.

    On a busy machine, two threads are as slow as the slower one; on a quiet machine, they are nearly twice as fast.
    A fixed number of threads keeps the order of floating-point sums, and so makes a resumed run equal bit by bit.

    Args:
        threads: number of threads, or 0 to tune between 1 and the number of cores.
        period: steps between two measurements.
        probe: steps timed for each candidate.
    """

    def __init__(self, threads: int, period: int = 150, probe: int = 4) -> None:
        self.candidates = [threads] if threads else sorted({1, torch.get_num_threads()})
        self.period, self.probe = period, probe
        self._position, self._last = 0, time.monotonic()
        self._seconds = dict.fromkeys(self.candidates, 0.0)
        torch.set_num_threads(self.candidates[0])

    def step(self) -> None:
        """Call after every step."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if len(self.candidates) == 1:
            return
        stage, offset = divmod(self._position, self.probe + 1)
        if stage < len(self.candidates):
            candidate = self.candidates[stage]
            self._seconds[candidate] = 0.0 if offset == 0 else self._seconds[candidate] + seconds
        self._position += 1
        following = self._position // (self.probe + 1)
        if following < len(self.candidates):
            torch.set_num_threads(self.candidates[following])
        elif following == len(self.candidates) and self._position % (self.probe + 1) == 0:
            torch.set_num_threads(min(self.candidates, key=self._seconds.__getitem__))
        elif self._position >= self.period:
            self._position = 0
            torch.set_num_threads(self.candidates[0])
