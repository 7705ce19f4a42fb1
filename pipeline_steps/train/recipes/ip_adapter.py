"""Recipe `adapter`: its data, the order in which they are seen, and its training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.diffusion.audio_tokens import GridEncoder
from pipeline_steps.diffusion.image_processor import normalize_to_tensor, pad_to_square
from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter, collate_audio_tokens
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.train.audio_feature_cache import Tracks, distinct_sounds, pair_tracks
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.data import (
    WHOLE,
    BatchPartition,
    StepIndexedBatches,
    TrainingBatch,
    batch_indices,
    deterministic_batch,
    step_generator,
)
from pipeline_steps.train.lightning_module import DiffusionModule, warmup_cosine

LATENTS_VERSION = 1
"""Raised whenever latents change: part of the memo's fingerprint."""
LATENTS_SCHEMA = pa.schema([pa.field("mean", pa.binary()), pa.field("std", pa.binary())])
ENCODED_TOGETHER = 16
"""Pictures of a forward pass on a GPU; on a CPU they go one by one, so that their bytes depend on no neighbour."""
LATENTS_PART = 256


@dataclass(frozen=True, slots=True)
class AdapterDataset:
    """Pairs of one split, ready to be drawn from.

    Attributes:
        means, stds: float16 [P, V, C, h, w], latents of each picture and (V = 2) of its mirror image, as distributions.
        pictures, sounds: [N] rows of each pair's picture and sound.
        grids: by sound, one float16 grid [moments, bands, width] a view; the first is the whole, clean sound.
    """

    means: torch.Tensor
    stds: torch.Tensor
    pictures: list[int]
    sounds: list[int]
    grids: list[list[torch.Tensor]]

    def __len__(self) -> int:
        return len(self.sounds)


def picture_latents(
    backbone: StableDiffusionBackbone,
    memo: ResultCache,
    picture: Callable[[str], ByteArray],
    image_ids: list[str],
    size: int,
    mirror: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and deviations float16 [P, V, C, h, w] of the latents of pictures, remembered by picture.

    Args:
        backbone: its autoencoder makes them; loaded.
        memo: of `LATENTS_SCHEMA`, marked with backbone and size.
        picture: RGB uint8 [H, W, 3] by id.
        image_ids: each once.
        size: side in px.
        mirror: whether the mirror image is wanted too.
    """
    wanted = [(image_id, turned) for image_id in image_ids for turned in ((False, True) if mirror else (False,))]
    keys = [f"{image_id}{'-mirrored' if turned else ''}" for image_id, turned in wanted]
    known = memo.load(keys)
    missing = [(key, *item) for key, item in zip(keys, wanted, strict=True) if key not in known]
    together = ENCODED_TOGETHER if backbone.device.type == "cuda" else 1
    fresh: dict[str, dict[str, Any]] = {}
    for start in range(0, len(missing), together):
        chunk = missing[start : start + together]
        pictures = [pad_to_square(picture(image_id), size) for _, image_id, _ in chunk]
        turned = [row[:, ::-1] if mirrored else row for row, (_, _, mirrored) in zip(pictures, chunk, strict=True)]
        mean, std = (part.half().cpu().numpy() for part in backbone.encode(normalize_to_tensor(np.stack(turned))))
        fresh |= {key: {"mean": mean[at].tobytes(), "std": std[at].tobytes()} for at, (key, _, _) in enumerate(chunk)}
        if len(fresh) >= LATENTS_PART:
            memo.append(fresh)
            known |= fresh
            fresh = {}
    memo.append(fresh)
    known |= fresh
    side, variants = size // backbone.stride, 2 if mirror else 1
    shape = (len(image_ids), variants, backbone.channels, side, side)

    def stacked(column: str) -> torch.Tensor:
        rows = [np.frombuffer(known[key][column], np.float16) for key in keys]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros(0, np.float16)).view(shape)

    return stacked("mean"), stacked("std")


def latents_fingerprint(config: TrainConfig, backbone: StableDiffusionBackbone, accelerator: str) -> str:
    """Fingerprint of the memo that keeps latents. A GPU rounds them differently; the autoencoder is in float32 everywhere."""
    return fingerprint(
        {
            "backbone": backbone.describe(),
            "size": config.picture_size,
            "accelerator": accelerator,
            "version": LATENTS_VERSION,
        }
    )


def adapter_data(
    config: TrainConfig,
    rows: list[dict[str, Any]],
    views: dict[Tracks, list[torch.Tensor]],
    image: Callable[[str], ByteArray],
    backbone: StableDiffusionBackbone,
    memo: ResultCache,
) -> AdapterDataset:
    """The pairs of a split: latents of their pictures (see `picture_latents`) and the grids of their sounds' views."""
    sounds = {tracks: number for number, tracks in enumerate(distinct_sounds(rows))}
    images = {image_id: number for number, image_id in enumerate(sorted({row["image_id"] for row in rows}))}
    means, stds = picture_latents(backbone, memo, image, list(images), config.picture_size, config.picture.mirror > 0)
    return AdapterDataset(
        means,
        stds,
        pictures=[images[row["image_id"]] for row in rows],
        sounds=[sounds[pair_tracks(row)] for row in rows],
        grids=[views[tracks] for tracks in sounds],
    )


class AdapterBatches(StepIndexedBatches):
    """Batches of recipe `adapter`. Latents are drawn from their distributions."""

    def __init__(
        self,
        data: AdapterDataset,
        backbone: StableDiffusionBackbone,
        config: TrainConfig,
        first: int,
        share: BatchPartition = WHOLE,
    ) -> None:
        super().__init__(first, share)
        self.data, self.backbone, self.config = data, backbone, config

    def batch(self, step: int, micro: int = 0) -> TrainingBatch:
        """This process's batch of a step and microbatch."""
        config, data = self.config, self.data
        rows = batch_indices(len(data), config.optimiser.adapt.batch_size, config.seed, step)
        draws = step_generator(config.seed, "batch", step)
        count, times = len(rows), self.backbone.noise.config.num_train_timesteps
        share, mine = self.share, self.share.slice_of(count, micro)
        mirrored = (torch.rand(count, generator=draws) < config.picture.mirror).long()[mine]
        pictures = torch.tensor([data.pictures[row] for row in rows[mine]])
        mean, std = data.means[pictures, mirrored].float(), data.stds[pictures, mirrored].float()
        shape = (count, *mean.shape[1:])
        latents = self.backbone.latents(mean, std, torch.randn(shape, generator=draws)[mine])
        grids = []
        for row in rows:
            views = data.grids[data.sounds[row]]
            grids.append(views[int(torch.randint(len(views), (1,), generator=draws))])
        return TrainingBatch(
            step=step,
            rows=rows[mine],
            latents=latents,
            tokens=collate_audio_tokens(grids[mine]),
            noise=torch.randn(shape, generator=draws)[mine],
            times=((torch.randint(times, (count,), generator=draws) + 0.5) / times)[mine],
            heard=(torch.rand(count, generator=draws) >= config.objective.condition_dropout)[mine],
            total=count,
            part=share.part(micro),
            parts=share.parts,
            last=micro + 1 == share.accumulate,
        )


def validation_batch(
    data: AdapterDataset, backbone: StableDiffusionBackbone, seed: int, limit: int = 32
) -> TrainingBatch | None:
    """A fixed batch of held-out pairs: most likely latents, clean sounds."""
    rows = list(range(min(limit, len(data))))
    if not rows:
        return None
    mean = data.means[[data.pictures[row] for row in rows], 0].float()
    latents = backbone.latents(mean, torch.zeros_like(mean), torch.zeros_like(mean))
    return deterministic_batch(rows, latents, collate_audio_tokens([data.grids[data.sounds[row]][0] for row in rows]), seed)


def build_adapter(config: TrainConfig, backbone: StableDiffusionBackbone, encoder: GridEncoder) -> AudioIPAdapter:
    """An untrained adapter in a loaded backbone.

    Raises:
        ConfigError: picture size or prompt do not fit the backbone.
    """
    levels = len(backbone.unet.config.block_out_channels) - 1
    if config.picture_size % (backbone.stride * 2**levels):
        raise ConfigError(
            f"train.picture_size: {config.picture_size} px do not fit {config.backbone.model}",
            f"take a multiple of {backbone.stride * 2**levels}",
        )
    if config.backbone.prompt and not backbone.has_text_encoder:
        raise ConfigError(f"train.backbone.prompt: {config.backbone.model} reads no text", "set it to an empty text")
    part = config.resampler
    resampler = PerceiverResampler(encoder.width, encoder.bands, width=backbone.width, **part.model_dump())
    return AudioIPAdapter(backbone, resampler, config.backbone.prompt)


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """Weight of each sample's squared error, [N]: min(snr, gamma) / snr for epsilon, / (snr + 1) for velocities (Hang et al.
    2023, arXiv 2303.09556, section 3.4). Pure noise (snr 0) has the limit 1 and 0."""
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction == "v_prediction" else torch.where(snr > 0, clipped / snr.clamp(min=1e-20), 1.0)


class AudioIPAdapterModule(DiffusionModule):
    """Learns what the frozen backbone says (noise or velocity) at its own noise levels, by keys, values and resampler alone."""

    def on_fit_start(self) -> None:
        """The backbone is no part of this module: it follows it to the device."""
        self.denoiser.backbone.to(self.device)

    @property
    def unet(self) -> Any:
        """The backbone's."""
        return self.denoiser.backbone.unet

    @property
    def unet_steps(self) -> tuple[int, int]:
        """All."""
        return 0, self.config.optimiser.adapt.steps

    def prepare(self, step: int) -> None:
        """Nothing changes in the course of training."""

    def losses(self, batch: TrainingBatch) -> torch.Tensor:
        """Squared error by sample, weighted by signal-to-noise ratio, [N]."""
        noise = self.denoiser.backbone.noise
        prediction = self.denoiser.backbone.prediction
        timesteps = (batch.times * noise.config.num_train_timesteps).long()
        noisy = noise.add_noise(batch.latents, batch.noise, timesteps)
        sought = batch.noise if prediction == "epsilon" else noise.get_velocity(batch.latents, batch.noise, timesteps)
        answer = self.denoiser(noisy, timesteps, batch.tokens, batch.heard)
        kept = noise.alphas_cumprod.to(timesteps.device)[timesteps]  # share of the signal in the noisy latents' variance
        weights = min_snr_weights(kept / (1 - kept), self.config.objective.min_snr, prediction)
        errors: torch.Tensor = (answer.float() - sought).square().mean((1, 2, 3)) * weights
        return errors

    def configure_optimizers(self) -> Any:
        """AdamW, fused; the rate warms up, then falls along a cosine to `final_share`."""
        part = self.config.optimiser
        optimiser = torch.optim.AdamW(
            self.denoiser.parameters(), lr=part.adapt.learning_rate, weight_decay=part.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: warmup_cosine(step, part.adapt.steps, part.warmup_steps, part.final_share)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
