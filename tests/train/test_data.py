"""Batches depend on seed and step only."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.train.data import BatchPartition, TrainingBatch, batch_indices
from pipeline_steps.train.recipes.ip_adapter.data import IPAdapterDataset
from tests.train.small_run import small_datamodule

FIELDS = ("latents", "noise", "times", "condition_mask")


def assert_equal(one: TrainingBatch, other: TrainingBatch) -> None:
    assert (one.step, one.rows, one.part, one.last) == (other.step, other.rows, other.part, other.last)
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("grids", "mask", "text"):
        assert torch.equal(getattr(one.audio, name), getattr(other.audio, name)), name


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 99))
def test_every_epoch_is_a_permutation_at_any_batch_size(count: int, batch_size: int, seed: int) -> None:
    steps = -(-2 * count // batch_size)
    rows = [row for step in range(steps) for row in batch_indices(count, batch_size, seed, step)]
    assert sorted(rows[:count]) == list(range(count))
    assert sorted(rows[count : 2 * count]) == list(range(count))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_returns_the_batches_in_order(workers: int, backbone: Path) -> None:
    loader = {"num_workers": workers, "prefetch_factor": 2 if workers else None}
    expected = small_datamodule(backbone)
    batches = iter(small_datamodule(backbone, **loader).train_dataloader())
    for step in range(6):
        assert_equal(next(batches), expected.training_batch(step))


def test_the_loader_starts_at_the_step_of_the_trainer_and_returns_every_microbatch(backbone: Path) -> None:
    class Resumed:
        global_step = 2

    partition = BatchPartition(accumulate=2)
    resumed = small_datamodule(backbone, partition)
    resumed.trainer = Resumed()
    batches = list(itertools.islice(resumed.train_dataloader(), 4))
    assert [(batch.step, batch.part, batch.last) for batch in batches] == [
        (2, 0, False),
        (2, 1, True),
        (3, 0, False),
        (3, 1, True),
    ]
    for batch, (step, micro) in zip(batches, ((2, 0), (2, 1), (3, 0), (3, 1)), strict=True):
        assert_equal(batch, small_datamodule(backbone, partition).training_batch(step, micro))


def test_an_error_of_a_batch_is_raised(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    datamodule = small_datamodule(backbone)
    monkeypatch.setattr(datamodule, "training_batch", lambda step, micro: (_ for _ in ()).throw(OSError("no such shard")))
    with pytest.raises(OSError, match="no such shard"):
        next(iter(datamodule.train_dataloader()))


def test_a_map_over_a_batch_changes_every_tensor(backbone: Path) -> None:
    batch = small_datamodule(backbone).training_batch(0)
    visited: list[torch.Tensor] = []

    def change(tensor: torch.Tensor) -> torch.Tensor:
        visited.append(tensor)
        return tensor + 1 if tensor.is_floating_point() else tensor

    changed = batch.map_tensors(change)
    assert len(visited) == 7  # latents, noise, times, condition_mask, grids, mask, text
    assert torch.equal(changed.audio.text, batch.audio.text + 1)
    assert changed.rows == batch.rows
    assert len(batch.audio.select([0, 1])) == 2
    assert_equal(batch.to("cpu"), batch)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(20, 70))
def test_processes_and_microbatches_use_each_sample_once(ranks: int, accumulate: int, count: int) -> None:
    taken: list[int] = []
    for rank in range(ranks):
        for micro in range(accumulate):
            taken += range(count)[BatchPartition(rank, ranks, accumulate).slice_of(count, micro)]
    assert taken == list(range(count))


def test_slices_are_parts_of_the_whole_batch(backbone: Path) -> None:
    whole = small_datamodule(backbone, hflip_prob=0.5)
    for step in (0, 4):
        expected = whole.training_batch(step)
        slices = [small_datamodule(backbone, BatchPartition(rank, 2), 0.5).training_batch(step) for rank in range(2)]
        assert [row for part in slices for row in part.rows] == expected.rows
        for name in FIELDS:
            assert torch.equal(torch.cat([getattr(part, name) for part in slices]), getattr(expected, name)), name
        assert torch.equal(torch.cat([part.audio.text for part in slices]), expected.audio.text)
        assert sum(int(part.audio.mask.sum()) for part in slices) == int(expected.audio.mask.sum())
        assert sum(part.weight for part in slices) / 2 == pytest.approx(1.0)
        assert [(part.part, part.parts, part.total, part.last) for part in slices] == [
            (0, 2, len(expected.rows), True),
            (1, 2, len(expected.rows), True),
        ]


def test_about_the_configured_fraction_of_samples_is_unconditional(backbone: Path) -> None:
    datamodule = small_datamodule(backbone)
    mask = torch.cat([datamodule.training_batch(step).condition_mask for step in range(200)])
    assert 0.80 < float(mask.float().mean()) < 0.90


def test_validation_is_fixed_and_spreads_times_evenly(backbone: Path) -> None:
    first, second = (small_datamodule(backbone).validation_batch() for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.noise, second.noise)
    assert torch.allclose(first.times, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    datamodule = small_datamodule(backbone)
    datamodule.validation = IPAdapterDataset(datamodule.train.means[:0], datamodule.train.stds[:0], [], [], [])
    assert datamodule.validation_batch() is None
    assert list(datamodule.val_dataloader()) == [None]
