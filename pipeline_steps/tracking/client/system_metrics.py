"""System metrics under MLflow's names (`system/...`), sampled by a daemon thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

Sample = dict[str, float]

INTERVAL_S = 10.0


class SystemMetricsMonitor:
    """Samples CPU, memory, disk and GPU metrics every `interval_s` seconds until stopped.

    `log` is called with the values and a step that starts at `first_step`. A failed sample is skipped.
    """

    def __init__(self, log: Callable[[Sample, int], None], first_step: int = 0, interval_s: float = INTERVAL_S) -> None:
        self._log = log
        self._step = first_step
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Start sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _loop(self) -> None:
        try:
            import psutil

            process = psutil.Process()
            psutil.cpu_percent()  # the first call only sets the reference
        except Exception:
            return
        while not self._stop.wait(self._interval_s):
            try:
                values = sample(process)
            except Exception:  # noqa: S112 - a child process may have exited; the next sample replaces this one
                continue
            self._log(values, self._step)
            self._step += 1


def sample(process: object) -> Sample:
    """Measure percentages in 0..100 and memory in megabytes (10^6 bytes). `process` is a `psutil.Process`."""
    import psutil

    memory = psutil.virtual_memory()
    resident = 0
    for member in (process, *process.children(recursive=True)):  # type: ignore[attr-defined]
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
