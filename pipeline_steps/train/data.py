"""The data of a run and the order in which it is seen: batch k is a function of (seed, k) and of nothing else.

That is what makes a resumed run equal to an undisturbed one: nothing random has a state that a crash could lose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.seeding import seeded_rng as numpy_generator
from pipeline_steps.diffusion.audio_conditioner import AudioConditioner, ConditionerInput
from pipeline_steps.diffusion.audio_features import AudioFeatures
from pipeline_steps.diffusion.autoencoder import Codec
from pipeline_steps.diffusion.image_processor import normalize_to_tensor, pad_to_square
from pipeline_steps.diffusion.ip_adapter import AudioTokenBatch
from pipeline_steps.diffusion.rectified_flow import logit_normal_times
from pipeline_steps.train.audio_feature_cache import Tracks, distinct_sounds, pair_tracks
from pipeline_steps.train.augmentations import augment_images
from pipeline_steps.train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class ScratchDataset:
    """Pairs of one split, ready to be drawn from.

    Attributes:
        pictures: float32 [N, 3, H, W] in [-1, 1], one a pair.
        sounds: [N] row of each pair's sound in `tokens`.
        tokens: by sound, its variants (views and windows of them) as token rows; the first row is the whole, clean sound.
    """

    pictures: torch.Tensor
    sounds: list[int]
    tokens: list[ConditionerInput]

    def __len__(self) -> int:
        return len(self.sounds)

    def clean_tokens(self, rows: list[int]) -> ConditionerInput:
        """Tokens of the whole, clean sounds of some pairs."""
        chosen = [self.tokens[self.sounds[row]] for row in rows]
        return ConditionerInput(
            torch.stack([item.frames[0] for item in chosen]), torch.stack([item.summary[0] for item in chosen])
        )


@dataclass(frozen=True, slots=True)
class BatchPartition:
    """What one process takes of each optimiser step: `accumulate` of `ranks * accumulate` slices, one a microbatch."""

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    @property
    def parts(self) -> int:
        """Slices of an optimiser step."""
        return self.ranks * self.accumulate

    def part(self, micro: int) -> int:
        """Place of microbatch `micro` of this process among them."""
        return self.rank * self.accumulate + micro

    def slice_of(self, count: int, micro: int) -> slice:
        """Which of `count` samples microbatch `micro` of this process takes: together, each sample once."""
        part = self.part(micro)
        return slice(count * part // self.parts, count * (part + 1) // self.parts)


WHOLE = BatchPartition()


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Input of one microbatch. `heard` [N] is false where the sound is withheld; `times` [N]; `rows` are pair rows.

    Attributes:
        step: the optimiser step it belongs to.
        total: samples of that step, over all microbatches and processes.
        part, parts: its place among the slices of the step.
        tokens: what the recipe's denoiser hears.
        last: whether the optimiser moves after it.
    """

    step: int
    rows: list[int]
    latents: torch.Tensor
    tokens: ConditionerInput | AudioTokenBatch
    noise: torch.Tensor
    times: torch.Tensor
    heard: torch.Tensor
    total: int = 0
    part: int = 0
    parts: int = 1
    last: bool = True

    @property
    def weight(self) -> float:
        """What the mean loss counts, so that the mean over all slices is the mean over all samples of the step."""
        return len(self.rows) * self.parts / self.total if self.parts > 1 else 1.0

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The same on a device."""
        return replace(
            self,
            latents=self.latents.to(device),
            tokens=self.tokens.to(device),
            noise=self.noise.to(device),
            times=self.times.to(device),
            heard=self.heard.to(device),
        )


def paired_data(
    rows: list[dict[str, Any]],
    image: Callable[[str], ByteArray],
    views: dict[Tracks, list[AudioFeatures]],
    conditioner: AudioConditioner,
    size: int,
) -> ScratchDataset:
    """The pairs of a split: pictures by id as squares of `size` px, and the token variants of each sound's views."""
    sounds = distinct_sounds(rows)
    number = {tracks: index for index, tracks in enumerate(sounds)}
    pictures = [pad_to_square(image(row["image_id"]), size) for row in rows]
    stacked = np.stack(pictures) if pictures else np.zeros((0, size, size, 3), np.uint8)
    return ScratchDataset(
        pictures=normalize_to_tensor(stacked),
        sounds=[number[pair_tracks(row)] for row in rows],
        tokens=[token_variants(conditioner, views[tracks]) for tracks in sounds],
    )


def token_variants(conditioner: AudioConditioner, views: list[AudioFeatures]) -> ConditionerInput:
    """Token rows of a sound's views: each whole, and for longer sounds its first and second half as well."""
    rows = []
    for view in views:
        rows.append(conditioner.tokens(view))
        if view.patches >= 4:
            half = view.patches // 2
            rows.append(conditioner.tokens(view.window(0, half)))
            rows.append(conditioner.tokens(view.window(view.patches - half, half)))
    return ConditionerInput(torch.cat([row.frames for row in rows]), torch.cat([row.summary for row in rows]))


def step_generator(seed: int, scope: str, step: int) -> torch.Generator:
    """A torch generator for a purpose and a step."""
    entropy = numpy_generator(seed, scope, str(step)).integers(2**63)
    return torch.Generator().manual_seed(int(entropy))


def batch_indices(count: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Pair rows of a step: epochs are permutations of all pairs, laid end to end and cut into batches."""
    rows: list[int] = []
    first = step * batch_size
    while len(rows) < batch_size:
        epoch, offset = divmod(first + len(rows), count)
        order = numpy_generator(seed, "order", str(epoch)).permutation(count)
        rows += [int(row) for row in order[offset : offset + batch_size - len(rows)]]
    return rows


class StepIndexedBatches(IterableDataset[TrainingBatch], ABC):
    """Endless batches of one process from step `first` on; batch k is a function of (seed, k).

    What is random is drawn for the whole optimiser step and then cut, so a run does not depend on how many processes and
    microbatches share it.
    """

    def __init__(self, first: int, share: BatchPartition) -> None:
        self.first = first
        self.share = share

    @abstractmethod
    def batch(self, step: int, micro: int = 0) -> TrainingBatch:
        """This process's batch of a step and microbatch."""

    def __iter__(self) -> Iterator[TrainingBatch]:
        step = self.first
        while True:
            for micro in range(self.share.accumulate):
                yield self.batch(step, micro)
            step += 1


class ScratchBatches(StepIndexedBatches):
    """Batches of recipe `scratch`. The codec is frozen; pictures are varied, then encoded."""

    def __init__(
        self, data: ScratchDataset, codec: Codec, config: TrainConfig, first: int, share: BatchPartition = WHOLE
    ) -> None:
        super().__init__(first, share)
        self.data = data
        self.codec = codec
        self.config = config
        part = config.picture
        self._still: torch.Tensor | None = None
        if not (part.mirror or part.scale or part.shift):  # pictures never vary: encode them once
            with torch.no_grad():
                self._still = torch.cat([codec.encode(chunk) for chunk in torch.split(data.pictures, 64)])

    def batch(self, step: int, micro: int = 0) -> TrainingBatch:
        """This process's batch of a step and microbatch; the step's size is that of its phase."""
        seed, objective, phases = self.config.seed, self.config.objective, self.config.optimiser
        composing = step < phases.compose.steps
        if composing:
            rows = batch_indices(len(self.data), phases.compose.batch_size, seed, step)
        else:
            rows = batch_indices(len(self.data), phases.refine.batch_size, seed + 1, step - phases.compose.steps)
        count, share = len(rows), self.share
        mine = share.slice_of(count, micro)
        draws = step_generator(seed, "batch", step)
        if self._still is not None:
            latents = self._still[rows[mine]]
        else:
            views = augment_images(self.data.pictures[rows], self.config.picture, draws, mine)
            with torch.no_grad():
                latents = self.codec.encode(views)
        variants = [self.data.tokens[self.data.sounds[row]] for row in rows]
        choices = [int(torch.randint(len(variant), (1,), generator=draws)) for variant in variants]
        chosen = list(zip(variants[mine], choices[mine], strict=True))
        return TrainingBatch(
            step=step,
            rows=rows[mine],
            latents=latents,
            tokens=ConditionerInput(
                torch.stack([variant.frames[choice] for variant, choice in chosen]),
                torch.stack([variant.summary[choice] for variant, choice in chosen]),
            ),
            noise=torch.randn((count, *latents.shape[1:]), generator=draws)[mine],
            times=logit_normal_times(count, objective.time_mean, objective.time_std, draws)[mine],
            heard=(torch.rand(count, generator=draws) >= objective.condition_dropout)[mine],
            total=count,
            part=share.part(micro),
            parts=share.parts,
            last=micro + 1 == share.accumulate,
        )


def validation_batch(data: ScratchDataset, codec: Codec, seed: int, limit: int = 64) -> TrainingBatch | None:
    """A fixed batch of held-out pairs: unchanged pictures, clean sounds."""
    rows = list(range(min(limit, len(data))))
    if not rows:
        return None
    with torch.no_grad():
        latents = codec.encode(data.pictures[rows])
    return deterministic_batch(rows, latents, data.clean_tokens(rows), seed)


def deterministic_batch(
    rows: list[int], latents: torch.Tensor, tokens: ConditionerInput | AudioTokenBatch, seed: int
) -> TrainingBatch:
    """A batch to compare losses by: times spread evenly, always the same noise, every sound heard."""
    return TrainingBatch(
        step=0,
        rows=rows,
        latents=latents,
        tokens=tokens,
        noise=torch.randn(latents.shape, generator=step_generator(seed, "validation", 0)),
        times=torch.from_numpy((np.arange(len(rows)) + 0.5) / len(rows)).float(),
        heard=torch.ones(len(rows), dtype=torch.bool),
    )
