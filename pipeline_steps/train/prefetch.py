"""Batches on their way to the device: prepared ahead by a thread, copied beside the work; and how long the work waited."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")

KEPT_EVENTS = 256


def map_tensors(value: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """The same dataclass (or list, tuple, dict, tensor) with every tensor in it changed."""
    found: Any = value
    if isinstance(value, torch.Tensor):
        found = change(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        found = dataclasses.replace(value, **{name: map_tensors(part, change) for name, part in parts.items()})
    elif isinstance(value, dict):
        found = {name: map_tensors(part, change) for name, part in value.items()}
    elif isinstance(value, (list, tuple)) and any(not isinstance(part, (int, float, str)) for part in value):
        found = type(value)(map_tensors(part, change) for part in value)
    return found  # type: ignore[no-any-return]


class Prefetcher(Iterable[T]):
    """Batches prepared by a thread, at most `depth` ahead; on a GPU from pinned memory, copied on a stream of their own.

    The order is that of `batches`; what it raises is raised here.
    """

    def __init__(self, batches: Iterable[T], depth: int, device: torch.device) -> None:
        self.batches = batches
        self.depth = depth
        self.device = device

    def __iter__(self) -> Iterator[T]:
        ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(self.depth)
        stop = threading.Event()

        def put(item: tuple[T | None, BaseException | None]) -> None:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for batch in self.batches:
                    put((self._pinned(batch), None))
                    if stop.is_set():
                        return
                put((None, None))
            except BaseException as error:
                put((None, error))

        thread = threading.Thread(target=work, daemon=True, name="batches ahead")
        thread.start()
        copies: Any = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

        def fetch() -> T | None:
            batch, error = ready.get()
            if error is not None:
                raise error
            return batch if batch is None or copies is None else self._copied(batch, copies)

        try:
            following = fetch()
            while following is not None:
                batch = following
                if copies is not None:
                    here = torch.cuda.current_stream(self.device)
                    here.wait_stream(copies)
                    map_tensors(batch, partial(_used_on, here))
                    following = fetch()  # its copy runs beside the work on this one
                    yield batch
                else:
                    yield batch
                    following = fetch()
        finally:
            stop.set()
            thread.join()

    def _pinned(self, batch: T) -> T:
        return map_tensors(batch, torch.Tensor.pin_memory) if self.device.type == "cuda" else batch

    def _copied(self, batch: T, stream: Any) -> T:
        with torch.cuda.stream(stream):
            return map_tensors(batch, lambda tensor: tensor.to(self.device, non_blocking=True))


def _used_on(stream: Any, tensor: torch.Tensor) -> torch.Tensor:
    tensor.record_stream(stream)  # its memory, taken on the copying stream, is free only when the work is done
    return tensor


class TimedLoader(Iterable[T]):
    """The same batches; `waited` says for how long the work had to wait for them.

    On a GPU that is the time in which the device had nothing to do (measured on the device by events): a loader that is
    late while earlier work still runs costs nothing.
    """

    def __init__(self, batches: Iterable[T], device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def __iter__(self) -> Iterator[T]:
        batches = iter(self.batches)
        while True:
            begin, mark = time.perf_counter(), self._event()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if mark is None:
                self._seconds += time.perf_counter() - begin
            else:
                self._events.append((mark, self._event()))
                if len(self._events) >= KEPT_EVENTS:
                    self.waited()
            yield batch

    def waited(self) -> float:
        """Seconds since the beginning."""
        if self._events:
            torch.cuda.synchronize(self.device)
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000.0
            self._events = []
        return self._seconds

    def _event(self) -> Any:
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event
