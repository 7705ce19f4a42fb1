"""Data of recipe `scratch`: images, conditioner inputs of all augmentations, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline_steps.audio.mixing import Tracks
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.diffusion.audio_conditioner import AudioConditioner, ConditionerInput, collate
from pipeline_steps.diffusion.audio_features import AudioFeatures
from pipeline_steps.diffusion.autoencoder import Autoencoder
from pipeline_steps.diffusion.image_processor import normalize_to_tensor, pad_to_square
from pipeline_steps.diffusion.rectified_flow import logit_normal_times
from pipeline_steps.train.audio_feature_cache import clip_of, distinct_clips
from pipeline_steps.train.augmentations import augment_images
from pipeline_steps.train.config_groups import ImageAugmentationConfig
from pipeline_steps.train.data import (
    AudioImageDataModule,
    BatchPartition,
    TrainingBatch,
    batch_indices,
    deterministic_batch,
    step_generator,
)
from pipeline_steps.train.recipes.scratch.config import ObjectiveConfig, ScratchPhases

VALIDATION_PAIRS = 64
MIN_PATCHES_TO_WINDOW = 4


@dataclass(frozen=True, slots=True)
class ScratchDataset:
    """Pairs of one split.

    Attributes:
        images: float32 [N, 3, H, W] in [-1, 1], one per pair.
        clips: [N] index of each pair's clip in `inputs`.
        inputs: conditioner inputs of each clip, one row per augmentation and window; the first is the whole, original clip.
    """

    images: torch.Tensor
    clips: list[int]
    inputs: list[ConditionerInput]

    def __len__(self) -> int:
        return len(self.clips)

    def original_inputs(self, rows: list[int]) -> ConditionerInput:
        """Conditioner inputs of the whole, original clips of some pairs."""
        return collate([self.inputs[self.clips[row]].select([0]) for row in rows])


def load_pairs(
    rows: list[dict[str, Any]],
    image: Callable[[str], ByteArray],
    features: Mapping[Tracks, list[AudioFeatures]],
    conditioner: AudioConditioner,
    resolution: int,
) -> ScratchDataset:
    """Pairs of a split: images as squares, and the conditioner inputs of the clips' augmentations."""
    clips = distinct_clips(rows)
    index = {tracks: number for number, tracks in enumerate(clips)}
    squares = [pad_to_square(image(row["image_id"]), resolution) for row in rows]
    stacked = np.stack(squares) if squares else np.zeros((0, resolution, resolution, 3), np.uint8)
    return ScratchDataset(
        images=normalize_to_tensor(stacked),
        clips=[index[clip_of(row)] for row in rows],
        inputs=[conditioner_inputs(conditioner, features[tracks]) for tracks in clips],
    )


def conditioner_inputs(conditioner: AudioConditioner, augmentations: list[AudioFeatures]) -> ConditionerInput:
    """Conditioner inputs of a clip: each augmentation as a whole, and for longer ones its first and second half."""
    rows = []
    for features in augmentations:
        rows.append(conditioner.encode(features))
        if features.patches >= MIN_PATCHES_TO_WINDOW:
            half = features.patches // 2
            rows.append(conditioner.encode(features.window(0, half)))
            rows.append(conditioner.encode(features.window(features.patches - half, half)))
    return collate(rows)


class ScratchDataModule(AudioImageDataModule):
    """Batches of recipe `scratch`: augmented images, encoded by the frozen autoencoder.

    Args:
        train, validation: pairs of the splits.
        autoencoder: frozen, on the CPU.
        augmentation: of images.
        objective, phases: groups of the recipe.
        seed: of order, augmentation and noise.
        partition, loader_arguments: see `AudioImageDataModule`.
    """

    def __init__(
        self,
        train: ScratchDataset,
        validation: ScratchDataset,
        autoencoder: Autoencoder,
        augmentation: ImageAugmentationConfig,
        objective: ObjectiveConfig,
        phases: ScratchPhases,
        seed: int,
        partition: BatchPartition,
        loader_arguments: Mapping[str, Any],
    ) -> None:
        super().__init__(partition, loader_arguments)
        self.train = train
        self.validation = validation
        self.autoencoder = autoencoder
        self.augmentation = augmentation
        self.objective = objective
        self.phases = phases
        self.seed = seed
        self._latents: torch.Tensor | None = None
        if not augmentation.enabled:  # images never change: encode them once
            with torch.no_grad():
                self._latents = torch.cat([autoencoder.encode(chunk) for chunk in torch.split(train.images, 64)])

    def training_batch(self, step: int, micro: int = 0) -> TrainingBatch:
        """This process's microbatch of a step; the size of the step is that of its phase."""
        data, phases, seed = self.train, self.phases, self.seed
        if step < phases.mlp.max_steps:
            rows = batch_indices(len(data), phases.mlp.batch_size, seed, step)
        else:
            rows = batch_indices(len(data), phases.unet.batch_size, seed + 1, step - phases.mlp.max_steps)
        count, mine = len(rows), self.partition.slice_of(len(rows), micro)
        generator = step_generator(seed, "batch", step)
        if self._latents is not None:
            latents = self._latents[rows[mine]]
        else:
            augmented = augment_images(data.images[rows], self.augmentation, generator, mine)
            with torch.no_grad():
                latents = self.autoencoder.encode(augmented)
        inputs = [data.inputs[data.clips[row]] for row in rows]
        choices = [int(torch.randint(len(variants), (1,), generator=generator)) for variants in inputs]
        audio = collate([variants.select([choice]) for variants, choice in list(zip(inputs, choices, strict=True))[mine]])
        objective = self.objective
        return TrainingBatch(
            latents=latents,
            noise=torch.randn((count, *latents.shape[1:]), generator=generator)[mine],
            times=logit_normal_times(count, objective.logit_mean, objective.logit_std, generator)[mine],
            condition_mask=(torch.rand(count, generator=generator) >= objective.conditioning_dropout_prob)[mine],
            audio=audio,
            rows=rows[mine],
            step=step,
            total=count,
            **self.partition.position(micro),
        )

    def validation_batch(self) -> TrainingBatch | None:
        """Fixed batch of validation pairs without augmentation."""
        rows = list(range(min(VALIDATION_PAIRS, len(self.validation))))
        if not rows:
            return None
        with torch.no_grad():
            latents = self.autoencoder.encode(self.validation.images[rows])
        return deterministic_batch(rows, latents, self.validation.original_inputs(rows), self.seed)
