"""Machine metrics under MLflow's own names (`system/...`), sampled by a daemon thread into the spool."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

Sample = dict[str, float]

INTERVAL_S = 10.0


class SystemMetricsMonitor:
    """Samples processor, memory, disk and GPU every `interval_s` seconds until stopped.

    `log` gets the values and a step that counts samples from `first_step`. A probe that fails is left out; it never raises.
    """

    def __init__(self, log: Callable[[Sample, int], None], first_step: int = 0, interval_s: float = INTERVAL_S) -> None:
        self._log = log
        self._step = first_step
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def stop(self) -> None:
        """Take no further samples."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _loop(self) -> None:
        try:
            import psutil

            process = psutil.Process()
            psutil.cpu_percent()  # the first call only sets the reference point
        except Exception:
            return
        while not self._stop.wait(self._interval_s):
            try:
                values = sample(process)
            except Exception:  # noqa: S112 - a probe may vanish (a child that ended); the next sample is as good
                continue
            self._log(values, self._step)
            self._step += 1


def sample(process: object) -> Sample:
    """One sample: percentages in 0..100, memory in megabytes (10^6 bytes). `process` is a `psutil.Process`."""
    import psutil

    memory = psutil.virtual_memory()
    family = [process, *process.children(recursive=True)]  # type: ignore[attr-defined]
    resident = 0
    for member in family:
        try:
            resident += member.memory_info().rss
        except psutil.Error:
            continue
    values = {
        "system/cpu_utilization_percentage": float(psutil.cpu_percent()),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": float(memory.percent),
        "system/disk_available_megabytes": psutil.disk_usage(".").free / 1e6,
        "system/process_memory_megabytes": resident / 1e6,
    }
    torch = sys.modules.get("torch")  # never import it for a sample
    if torch is not None and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            values[f"system/gpu_{index}_memory_usage_megabytes"] = (total - free) / 1e6
            values[f"system/gpu_{index}_memory_usage_percentage"] = 100.0 * (total - free) / total
            try:
                values[f"system/gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
            except Exception:  # noqa: S112 - needs the NVML bindings, which are optional
                continue
    return values
