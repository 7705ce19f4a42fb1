"""Batches ahead of the work: same order, same content, errors passed on, waiting measured."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from pipeline_steps.train.prefetch import Prefetcher, TimedLoader, map_tensors
from tests.train.test_data import _stream

CPU = torch.device("cpu")


def test_batches_ahead_are_the_batches_in_order() -> None:
    expected = [_stream(0).batch(step) for step in range(6)]
    got = list(itertools.islice(iter(Prefetcher(_stream(0), 2, CPU)), 6))
    assert [batch.step for batch in got] == list(range(6))
    for one, other in zip(expected, got, strict=True):
        assert one.rows == other.rows
        assert torch.equal(one.noise, other.noise)
        assert torch.equal(one.tokens.frames, other.tokens.frames)


def test_it_ends_when_they_end_and_raises_what_they_raise() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("no such shard")

    assert list(Prefetcher([1, 2, 3], 1, CPU)) == [1, 2, 3]
    batches = iter(Prefetcher(broken(), 4, CPU))
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(OSError, match="no such shard"):
        next(batches)


def test_it_is_no_more_than_its_depth_ahead_and_leaves_no_thread() -> None:
    made: list[int] = []

    def count() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    before = threading.active_count()
    batches = iter(Prefetcher(count(), 3, CPU))
    assert next(batches) == 0
    time.sleep(0.2)
    assert len(made) <= 6  # one in hand, three ready, one being put
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_every_tensor_of_a_batch_is_reached() -> None:
    batch = _stream(0).batch(0)
    seen: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor + 1 if tensor.is_floating_point() else tensor

    changed = map_tensors(batch, note)
    assert len(seen) == 6  # latents, frames, summary, noise, times, heard
    assert torch.equal(changed.tokens.summary, batch.tokens.summary + 1)
    assert changed.rows == batch.rows
    assert map_tensors({"a": [torch.zeros(1), "b"]}, note) == {"a": [torch.ones(1), "b"]}


def test_waiting_is_the_time_of_the_loader_not_of_the_work() -> None:
    def slow() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    waiting = TimedLoader(slow(), CPU)
    begin = time.perf_counter()
    for _ in waiting:
        time.sleep(0.03)
    spent = time.perf_counter() - begin
    assert 0.15 <= waiting.waited() <= spent - 0.09
