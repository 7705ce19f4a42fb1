"""System metrics under MLflow's names (`system/...`), sampled by a daemon thread."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Sample = dict[str, float]

INTERVAL_S = 10.0


@contextmanager
def log_system_metrics(log: Callable[[Sample, int], None], first_step: int) -> Iterator[None]:
    """Sample CPU, memory, disk and GPU every INTERVAL_S seconds in a daemon thread while the block runs.

    `log` is called with the values and a step that starts at `first_step`. A failed sample is skipped.
    """
    import psutil

    stop, process = threading.Event(), psutil.Process()
    psutil.cpu_percent()  # the first call only sets the reference

    def loop() -> None:
        for step in itertools.count(first_step):
            if stop.wait(INTERVAL_S):
                return
            try:
                values = sample(process)
            except Exception:  # noqa: S112 - a child process may have exited; the next sample replaces this one
                continue
            log(values, step)

    thread = threading.Thread(target=loop, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=2.0)


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
