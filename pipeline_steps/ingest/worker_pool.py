"""Pool of killable decoding processes. A file that hangs or crashes its process fails alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.context import SpawnContext, SpawnProcess
from types import TracebackType
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from pipeline_steps.core.errors import ResourceError
from pipeline_steps.core.process_limits import apply_process_limits

QUEUE_PER_WORKER = 4
MAX_STARTS = 3
"""Starts of a pool whose processes all end at once, before the stage fails."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerLimits(NamedTuple):
    """Number of processes, and the time per job and address space of each."""

    workers: int
    timeout_seconds: float
    memory_bytes: int


def core_count() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_STARTING = threading.Lock()


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Remove what names the main module's file, so that a process started meanwhile does not import it.

    The main module may be a user's script without a `__main__` guard: importing it would run the script again.
    """
    main = sys.modules["__main__"]
    with _STARTING:
        values = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
        try:
            for name in values:
                setattr(main, name, None)
            yield
        finally:
            for name, value in values.items():
                setattr(main, name, value)


class DecodingProcess(SpawnProcess):
    """Spawned process that does not import the main module of its parent."""

    def start(self) -> None:
        with _main_module_hidden():
            super().start()


class DecodingContext(SpawnContext):
    """Multiprocessing context `spawn` with `DecodingProcess`."""

    Process = DecodingProcess


class WorkerPool:
    """Context manager for processes that run `function` on jobs. They start with the first job.

    A job that fails with its process gets a result with a code: DECODER_TIMEOUT when it was killed, DECODER_CRASH when the
    process died, DECODER_MEMORY when it exceeded its memory. Other jobs continue, and the process is replaced. Processes
    import the modules `preload` before their memory is limited.
    """

    def __init__(self, limits: WorkerLimits, function: Callable[[Any], Any], preload: Sequence[str] = ()) -> None:
        self._limits = limits
        self._function = function
        self._preload = tuple(preload)
        self._pool: ProcessPool | None = None
        self._environment: dict[str, str | None] = {}

    def __enter__(self) -> WorkerPool:
        # One thread per process: the pool is the parallelism, and each BLAS thread would reserve address space.
        self._environment = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def map(self, jobs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield (key, result) for each (key, job) in order of completion. Jobs are read as the queue empties.

        Raises:
            ResourceError: decoding processes cannot be started.
        """
        source = iter(jobs)
        pending: dict[Future[Any], tuple[str, Any, int]] = {}
        queue_size = self._limits.workers * QUEUE_PER_WORKER
        while True:
            for key, job in islice(source, queue_size - len(pending)):
                pending[self._submit(job)] = (key, job, 1)
            if not pending:
                return
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in [future for future in pending if future in done]:  # `done` is a set: its order is arbitrary
                key, job, starts = pending.pop(future)
                try:
                    result = self._result(future)
                except BrokenProcessPool as error:
                    if starts >= MAX_STARTS:
                        raise ResourceError(
                            f"decoding processes end when they start: {error}",
                            "raise ingest.decoder.memory_mb or lower ingest.decoder.workers",
                        ) from error
                    self._stop()
                    lost = [(key, job, starts), *pending.values()]
                    pending = {self._submit(job): (key, job, starts + 1) for key, job, starts in lost}
                    break  # the other futures of `done` belong to the stopped pool
                yield key, result

    def run(self, job: Any) -> Any:
        """Result of one job."""
        return next(self.map([("", job)]))[1]

    def _submit(self, job: Any) -> Future[Any]:
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._limits.workers,
                initializer=apply_process_limits,
                initargs=(self._limits.memory_bytes, self._preload),
                context=DecodingContext(),
            )
        future: Future[Any] = self._pool.schedule(self._function, args=(job,), timeout=self._limits.timeout_seconds)
        return future

    def _result(self, future: Future[Any]) -> Any:
        try:
            return future.result()
        except TimeoutError:
            return {"code": "DECODER_TIMEOUT", "reason": f"killed after {self._limits.timeout_seconds:g} s"}
        except MemoryError:
            return {"code": "DECODER_MEMORY", "reason": f"more than {self._limits.memory_bytes // 1_000_000} MB needed"}
        except ProcessExpired as error:
            code = int(error.exitcode or 0)
            if code == -signal.SIGKILL:
                return {"code": "DECODER_MEMORY", "reason": "the process was killed from outside, most likely for memory"}
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return {"code": "DECODER_CRASH", "reason": f"the decoding process died ({name})"}
        except BrokenProcessPool:
            raise
        except Exception as error:  # a defect of the decoder's wrapper concerns one file too
            return {"code": "DECODER_CRASH", "reason": f"{type(error).__name__}: {error}"}


def run_in_process(limits: WorkerLimits, function: Callable[[Any], Any], job: Any, preload: Sequence[str] = ()) -> Any:
    """Result of `function(job)`, computed in one decoding process with the same limits and failure codes."""
    with WorkerPool(limits._replace(workers=1), function, preload) as workers:
        return workers.run(job)
