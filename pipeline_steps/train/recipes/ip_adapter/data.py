"""Data of recipe `ip_adapter`: cached image latents, audio tokens of all augmentations, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.feature_store import FeatureStore, RowNumbers
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.diffusion.audio_tokens import AudioTokens
from pipeline_steps.diffusion.image_processor import normalize_to_tensor, pad_to_square
from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.train.audio_feature_cache import StoredClips, clip_of, distinct_clips, longest_augmentation
from pipeline_steps.train.data import (
    AudioImageDataModule,
    BatchPartition,
    TrainingBatch,
    batch_indices,
    deterministic_batch,
    step_generator,
)
from pipeline_steps.train.recipes.ip_adapter.config import IPAdapterConfig

LATENTS_VERSION = 1
"""Version of the latents, part of the cache fingerprint. Raise it whenever their values change."""
LATENT_COLUMNS = ("mean", "std")
"""Values of a stored image: float16 [C, h, w] each. The second is left out if latents are not sampled."""
GPU_BATCH_SIZE = 16
"""Images encoded together on a GPU. On a CPU they are encoded one by one, so that rounding does not depend on a batch."""
ROWS_PER_PART = 256
VALIDATION_PAIRS = 32


@dataclass(frozen=True, slots=True)
class StoredLatents:
    """Rows float16 [P, V, C, h, w] of a column of the store; those that an index selects are read.

    Attributes:
        rows: [P, V] in the store.
        shape: C, h, w.
    """

    store: FeatureStore
    column: str
    rows: RowNumbers
    shape: tuple[int, int, int]

    def __getitem__(self, index: tuple[Any, Any]) -> torch.Tensor:
        images, variants = index
        chosen = self.rows[np.asarray(images), np.asarray(variants)].reshape(-1)
        values = [np.frombuffer(self.store.read(int(row), self.column), np.float16) for row in chosen]
        return torch.from_numpy(np.stack(values)).view(-1, *self.shape)


@dataclass(frozen=True, slots=True)
class IPAdapterDataset:
    """Pairs of one split.

    Attributes:
        means, stds: float16 [P, V, C, h, w], latent distributions of each image and (V = 2) of its mirror image; stds are None
            if latents are not sampled.
        images, clips: [N] indices of each pair's image and clip.
        tokens: audio tokens of each clip, one item per augmentation, the first of the clip itself.
    """

    means: torch.Tensor | StoredLatents
    stds: torch.Tensor | StoredLatents | None
    images: Sequence[int] | RowNumbers
    clips: Sequence[int] | RowNumbers
    tokens: Sequence[Sequence[AudioTokens]]

    def __len__(self) -> int:
        return len(self.clips)


def load_or_encode_latents(
    backbone: StableDiffusionBackbone,
    store: FeatureStore,
    image: Callable[[str], ByteArray],
    image_ids: list[str],
    resolution: int,
    mirror: bool,
) -> list[StoredLatents]:
    """Means and standard deviations float16 [P, V, C, h, w] of the latents of images, stored by image.

    Args:
        backbone: its autoencoder is used; loaded.
        store: of `LATENT_COLUMNS` or the first of them, with the fingerprint of backbone and resolution.
        image: RGB uint8 [H, W, 3] by id.
        image_ids: distinct ids.
        resolution: side in px.
        mirror: whether mirror images are encoded too.
    """
    variants = ("", "-mirrored") if mirror else ("",)
    keys = [f"{image_id}{variant}" for image_id in image_ids for variant in variants]
    missing = np.flatnonzero(store.find(keys) < 0).tolist()
    batch_size = GPU_BATCH_SIZE if backbone.device.type == "cuda" else 1
    new: dict[str, dict[str, bytes]] = {}
    for start in range(0, len(missing), batch_size):
        chunk = missing[start : start + batch_size]
        squares = [pad_to_square(image(image_ids[item // len(variants)]), resolution) for item in chunk]
        oriented = [square[:, ::-1] if item % len(variants) else square for square, item in zip(squares, chunk, strict=True)]
        encoded = [part.half().cpu().numpy() for part in backbone.encode(normalize_to_tensor(np.stack(oriented)))]
        for place, item in enumerate(chunk):
            new[keys[item]] = {name: part[place].tobytes() for name, part in zip(store.columns, encoded, strict=False)}
        if len(new) >= ROWS_PER_PART:
            store.append(new)
            new = {}
    store.append(new)
    side = resolution // backbone.stride
    rows, shape = store.find(keys).reshape(len(image_ids), len(variants)), (backbone.channels, side, side)
    return [StoredLatents(store, column, rows, shape) for column in store.columns]


def latents_fingerprint(
    backbone: StableDiffusionBackbone, resolution: int, accelerator: str, columns: Sequence[str] = LATENT_COLUMNS
) -> str:
    """Fingerprint of the cache of latents. It contains the accelerator, because a GPU rounds differently."""
    identity = {"backbone": backbone.describe(), "size": resolution, "accelerator": accelerator, "version": LATENTS_VERSION}
    return fingerprint(identity if tuple(columns) == LATENT_COLUMNS else {**identity, "columns": list(columns)})


def load_pairs(
    rows: list[dict[str, Any]],
    features: StoredClips,
    latents: Callable[[list[str]], list[StoredLatents]],
) -> IPAdapterDataset:
    """Pairs of a split: latents of their images by id, and the audio tokens of their clips."""
    clips = {tracks: number for number, tracks in enumerate(distinct_clips(rows))}
    images = {image_id: number for number, image_id in enumerate(sorted({row["image_id"] for row in rows}))}
    means, *stds = latents(list(images))
    return IPAdapterDataset(
        means,
        stds[0] if stds else None,
        images=np.array([images[row["image_id"]] for row in rows], np.int32),
        clips=np.array([clips[clip_of(row)] for row in rows], np.int32),
        tokens=features.select(clips),
    )


class IPAdapterDataModule(AudioImageDataModule):
    """Batches of recipe `ip_adapter`. Latents are sampled from their cached distributions.

    Args:
        train, validation: pairs of the splits.
        adapter: in its loaded backbone, whose noise schedule and scaling are used; it collates audio tokens.
        config: group of the recipe.
        hflip_prob: probability of a mirror image.
        seed: of order, augmentation and noise.
        partition, loader_arguments: see `AudioImageDataModule`.
    """

    def __init__(
        self,
        train: IPAdapterDataset,
        validation: IPAdapterDataset,
        adapter: AudioIPAdapter,
        config: IPAdapterConfig,
        hflip_prob: float,
        seed: int,
        partition: BatchPartition,
        loader_arguments: Mapping[str, Any],
    ) -> None:
        super().__init__(partition, loader_arguments)
        self.train = train
        self.validation = validation
        self.adapter = adapter
        self.config = config
        self.hflip_prob = hflip_prob
        self.seed = seed

    def training_batch(self, step: int, micro: int = 0) -> TrainingBatch:
        """This process's microbatch of a step."""
        data = self.train
        rows = batch_indices(len(data), self.config.phase.batch_size, self.seed, step)
        generator = step_generator(self.seed, "batch", step)
        count, mine = len(rows), self.partition.slice_of(len(rows), micro)
        timesteps = self.adapter.backbone.noise_scheduler.config.num_train_timesteps
        mirrored = (torch.rand(count, generator=generator) < self.hflip_prob).long()[mine]
        images = torch.tensor([int(data.images[row]) for row in rows[mine]])
        mean = data.means[images, mirrored].float()
        std = torch.zeros_like(mean) if data.stds is None else data.stds[images, mirrored].float()
        shape = (count, *mean.shape[1:])
        latents = self.adapter.backbone.sample_latents(mean, std, torch.randn(shape, generator=generator)[mine])
        clips = []
        for row in rows:
            augmentations = data.tokens[data.clips[row]]
            clips.append(augmentations[int(torch.randint(len(augmentations), (1,), generator=generator))])
        return TrainingBatch(
            latents=latents,
            noise=torch.randn(shape, generator=generator)[mine],
            times=((torch.randint(timesteps, (count,), generator=generator) + 0.5) / timesteps)[mine],
            condition_mask=(torch.rand(count, generator=generator) >= self.config.conditioning_dropout_prob)[mine],
            audio=self.adapter.collate(clips[mine]),
            rows=rows[mine],
            step=step,
            total=count,
            **self.partition.position(micro),
        )

    def largest_microbatch(self) -> TrainingBatch:
        """Microbatch with as many samples as any, each with the longest clip."""
        batch = super().largest_microbatch()
        return replace(batch, audio=self.adapter.collate([longest_augmentation(self.train.tokens)] * len(batch.rows)))

    def validation_batch(self) -> TrainingBatch | None:
        """Fixed batch of validation pairs: means of the latents, original clips."""
        data = self.validation
        rows = list(range(min(VALIDATION_PAIRS, len(data))))
        if not rows:
            return None
        mean = data.means[[data.images[row] for row in rows], 0].float()
        latents = self.adapter.backbone.sample_latents(mean, torch.zeros_like(mean), torch.zeros_like(mean))
        tokens = self.adapter.collate([data.tokens[data.clips[row]][0] for row in rows])
        return deterministic_batch(rows, latents, tokens, self.seed)
