"""Batches of a run. Batch k is a function of (seed, k) alone, so a resumed run equals an undisturbed one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline_steps.core.feature_store import RowNumbers
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.diffusion.tensor_batch import TensorBatch

Microbatch = tuple[int, int]
"""Optimizer step and number of the microbatch in it."""


@dataclass(frozen=True, slots=True)
class BatchPartition:
    """Slice of each optimizer step that one process takes: `accumulate` of `ranks * accumulate` microbatches."""

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> int:
        """Microbatches of an optimizer step over all processes."""
        return self.ranks * self.accumulate

    def part(self, micro: int) -> int:
        """Position of this process's microbatch `micro` among them."""
        return self.rank * self.accumulate + micro

    def slice_of(self, count: int, micro: int) -> slice:
        """Samples of microbatch `micro`, out of `count`. All microbatches together contain each sample once."""
        part = self.part(micro)
        return slice(count * part // self.parts, count * (part + 1) // self.parts)

    def position(self, micro: int) -> dict[str, Any]:
        """Fields of `TrainingBatch` that locate microbatch `micro` in its step."""
        return {"part": self.part(micro), "parts": self.parts, "last": micro + 1 == self.accumulate}


@dataclass(frozen=True, slots=True)
class TrainingBatch(TensorBatch):
    """One microbatch.

    Attributes:
        latents, noise: [N, C, h, w].
        times: [N] in 0..1.
        condition_mask: [N], false where the audio is dropped.
        audio: input of the recipe's denoiser.
        rows: pair rows of the samples.
        step: optimizer step that the microbatch belongs to.
        total: samples of the step over all microbatches and processes.
        part, parts: position among the microbatches of the step.
        last: whether the optimizer step follows.
    """

    latents: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    condition_mask: torch.Tensor
    audio: Any
    rows: list[int]
    step: int = 0
    total: int = 0
    part: int = 0
    parts: int = 1
    last: bool = True

    @property
    def weight(self) -> float:
        """Weight of the mean loss, so that the mean over all microbatches is the mean over all samples of the step."""
        return len(self.rows) * self.parts / self.total if self.parts > 1 else 1.0


class AudioImageDataModule(pl.LightningDataModule):  # type: ignore[misc, unused-ignore]
    """Training batches from the trainer's step on, and one fixed validation batch.

    Random numbers are drawn for the whole optimizer step before it is split, so that the result does not depend on the number
    of processes and microbatches.

    Args:
        partition: slice of each step that this process takes.
        loader_arguments: `num_workers`, `prefetch_factor` and `pin_memory` of the DataLoader.
    """

    def __init__(self, partition: BatchPartition, loader_arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.partition = partition
        self.loader_arguments = loader_arguments

    def training_batch(self, step: int, micro: int = 0) -> TrainingBatch:
        """This process's microbatch of a step."""
        raise NotImplementedError

    def largest_microbatch(self) -> TrainingBatch:
        """Microbatch that needs the most memory, for the last process: the last one of a step has as many samples as any."""
        return self.training_batch(0, self.partition.accumulate - 1)

    def validation_batch(self) -> TrainingBatch | None:
        """Fixed batch of validation pairs without augmentation; None if there are no validation pairs."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[TrainingBatch]:
        """Endless loader of the microbatches from the trainer's step on."""
        first_step = self.trainer.global_step if self.trainer is not None else 0
        return DataLoader(
            _MicrobatchDataset(self),
            batch_size=None,
            sampler=_StepSampler(first_step, self.partition.accumulate),
            **self.loader_arguments,
        )

    def val_dataloader(self) -> DataLoader[TrainingBatch | None]:
        """Loader of the validation batch."""
        batches: Any = [self.validation_batch()]
        return DataLoader(batches, batch_size=None)


class _MicrobatchDataset(Dataset[TrainingBatch]):
    """Microbatches by (step, number)."""

    def __init__(self, datamodule: AudioImageDataModule) -> None:
        self.datamodule = datamodule

    def __getitem__(self, index: Microbatch) -> TrainingBatch:
        return self.datamodule.training_batch(*index)


class _StepSampler(Sampler[Microbatch]):
    """All microbatches from a step on, without end."""

    def __init__(self, first_step: int, accumulate: int) -> None:
        self.first_step, self.accumulate = first_step, accumulate

    def __iter__(self) -> Iterator[Microbatch]:
        return ((step, micro) for step in itertools.count(self.first_step) for micro in range(self.accumulate))


def step_generator(seed: int, scope: str, step: int) -> torch.Generator:
    """Torch generator of a purpose and a step."""
    entropy = seeded_rng(seed, scope, str(step)).integers(2**63)
    return torch.Generator().manual_seed(int(entropy))


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Pair rows of a step. Epochs are permutations of all pairs, concatenated and cut into batches."""
    rows: list[int] = []
    first = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(first + len(rows), count)
        rows += [int(row) for row in _epoch_order(count, seed, epoch)[offset : offset + batch_size - len(rows)]]
    return rows


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, epoch: int) -> RowNumbers:
    """Permutation of all pairs; kept, because that of a million pairs takes longer than a step."""
    return seeded_rng(seed, "order", str(epoch)).permutation(count).astype(np.int32)


def deterministic_batch(rows: list[int], latents: torch.Tensor, audio: TensorBatch, seed: int) -> TrainingBatch:
    """Batch for the validation loss: evenly spaced times, fixed noise, audio for every sample."""
    return TrainingBatch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=step_generator(seed, "validation", 0)),
        times=torch.from_numpy((np.arange(len(rows)) + 0.5) / len(rows)).float(),
        condition_mask=torch.ones(len(rows), dtype=torch.bool),
        audio=audio,
        rows=rows,
    )
