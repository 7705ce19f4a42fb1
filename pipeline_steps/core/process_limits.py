"""Resource limits that a process sets on itself before it decodes untrusted bytes."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import sys
from collections.abc import Iterable

PR_SET_PDEATHSIG = 1


def apply_process_limits(memory_bytes: int, preload: Iterable[str] = (), file_bytes: int = 0) -> None:
    """Bound the address space and the size of written files, write no core dump, and die with the parent.

    Args:
        memory_bytes: address space, in bytes; beyond it python raises MemoryError.
        preload: modules to import first, so that no import fails for lack of memory.
        file_bytes: size of a file that the process writes, in bytes; beyond it a signal ends the process.
    """
    for name in preload:
        importlib.import_module(name)
    with contextlib.suppress(OSError, AttributeError):  # only Linux has it; elsewhere the pool stops its workers
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # decoders print warnings, and a log file must not reach the size limit below
        os.dup2(quiet, stream)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if sys.platform != "darwin":  # macOS accepts RLIMIT_AS but does not enforce it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
