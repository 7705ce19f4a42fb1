"""A pool of killable decoding processes: one bad file costs one file, never the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from pipeline_steps.core.errors import ResourceError
from pipeline_steps.core.process_limits import apply_process_limits

QUEUE_PER_WORKER = 4
ATTEMPTS = 3
"""Starts of a pool whose processes all die at once, before the machine is blamed."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerLimits(NamedTuple):
    """Of one decoding process."""

    workers: int
    timeout_seconds: float
    memory_bytes: int


def core_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerPool:
    """Processes that run `function` on jobs; a context manager. Processes are started at the first job.

    A job that hangs is killed and answered with DECODER_TIMEOUT, one that dies with DECODER_CRASH, one that wants too much
    memory with DECODER_MEMORY; its neighbours are not touched and the process is replaced.
    """

    def __init__(self, bounds: WorkerLimits, function: Callable[[Any], Any], preload: Sequence[str] = ()) -> None:
        self._bounds = bounds
        self._function = function
        self._preload = tuple(preload)
        self._pool: ProcessPool | None = None
        self._environment: dict[str, str | None] = {}

    def __enter__(self) -> WorkerPool:
        # One thread a process: the pool is the parallelism, and each BLAS thread would reserve address space.
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

    def _start(self) -> ProcessPool:
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self._bounds.workers,
                initializer=apply_process_limits,
                initargs=(self._bounds.memory_bytes, self._preload),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pool

    def _stop(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def map(self, jobs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield (key, answer) for each (key, job) in order of completion; few jobs wait in the queue at any time.

        Raises:
            ResourceError: decoding processes cannot be started at all.
        """
        source = iter(jobs)
        waiting: dict[Future[Any], tuple[str, Any, int]] = {}
        limit = self._bounds.workers * QUEUE_PER_WORKER
        exhausted = False
        while True:
            while not exhausted and len(waiting) < limit:
                try:
                    key, job = next(source)
                except StopIteration:
                    exhausted = True
                else:
                    waiting[self._submit(job)] = (key, job, 1)
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                if future not in waiting:  # moved to a new pool while this batch was looked at
                    continue
                key, job, attempt = waiting.pop(future)
                try:
                    answer = self._answer(future)
                except BrokenProcessPool as error:
                    if attempt >= ATTEMPTS:
                        raise ResourceError(
                            f"decoding processes die at the start: {error}",
                            "raise ingest.limits.memory_mb or lower ingest.limits.workers",
                        ) from error
                    self._stop()
                    lost = [(key, job, attempt), *waiting.values()]
                    waiting = {self._submit(job): (key, job, attempt + 1) for key, job, attempt in lost}
                    break
                yield key, answer

    def _submit(self, job: Any) -> Future[Any]:
        future: Future[Any] = self._start().schedule(self._function, args=(job,), timeout=self._bounds.timeout_seconds)
        return future

    def _answer(self, future: Future[Any]) -> Any:
        megabytes = self._bounds.memory_bytes // 1_000_000
        try:
            return future.result()
        except TimeoutError:
            return {"code": "DECODER_TIMEOUT", "reason": f"killed after {self._bounds.timeout_seconds:g} s"}
        except MemoryError:
            return {"code": "DECODER_MEMORY", "reason": f"more than {megabytes} MB wanted"}
        except ProcessExpired as error:
            code = int(error.exitcode or 0)
            if code == -signal.SIGKILL:
                return {"code": "DECODER_MEMORY", "reason": "the process was killed from outside, most likely for memory"}
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return {"code": "DECODER_CRASH", "reason": f"the decoding process died ({name})"}
        except BrokenProcessPool:
            raise
        except Exception as error:  # a defect of the decoder's wrapper is one file's trouble as well
            return {"code": "DECODER_CRASH", "reason": f"{type(error).__name__}: {error}"}
