"""The recipes `scratch` and `adapter`: what each gives to the training loop, which is the same for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.diffusion.audio_features import AudioFeatures
from pipeline_steps.diffusion.audio_tokens import GridEncoder
from pipeline_steps.diffusion.autoencoder import Codec
from pipeline_steps.diffusion.ip_adapter import AudioEmbeds
from pipeline_steps.diffusion.pipelines.base import Audio2ImagePipeline, GenerationConfig
from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline, save_adapter
from pipeline_steps.diffusion.pipelines.safetensors_io import new_scheduler, save_model
from pipeline_steps.diffusion.pipelines.scratch import Audio2ImageFlowPipeline
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.train.audio_feature_cache import Tracks, distinct_sounds
from pipeline_steps.train.autoencoder_training import codec_psnr
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.data import (
    BatchPartition,
    ScratchBatches,
    StepIndexedBatches,
    TrainingBatch,
    paired_data,
    validation_batch,
)
from pipeline_steps.train.lightning_module import DiffusionModule, build_conditioner, build_denoiser, fit_prior
from pipeline_steps.train.recipes.ip_adapter import (
    AdapterBatches,
    AudioIPAdapterModule,
    adapter_data,
    build_adapter,
)
from pipeline_steps.train.recipes.ip_adapter import (
    validation_batch as adapter_validation_batch,
)

GRID_SOUNDS = 8
GRID_SAMPLES = 2
Split = dict[str, list[dict[str, Any]]]
"""Pairs by split."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A run, ready to begin.

    Attributes:
        module: what is trained.
        stream: a process's endless batches from a step on.
        held_out: batch of the validation loss, if there are held-out pairs.
        draw: sample grid uint8 [H, W, 3] with the weights as they are.
        save: writes the export into a new folder.
        metrics: of the data and the frozen parts.
    """

    module: DiffusionModule
    stream: Callable[[int, BatchPartition], StepIndexedBatches]
    held_out: Callable[[], TrainingBatch | None]
    draw: Callable[[], ByteArray]
    save: Callable[[Path], None]
    metrics: dict[str, Any]


def generation_config(config: TrainConfig) -> GenerationConfig:
    """What the exported model does when not told."""
    return GenerationConfig(
        steps=config.drawing.steps,
        guidance_scale=config.drawing.guidance_scale,
        max_seconds=config.sound.max_seconds,
        picture_size=config.picture_size,
    )


def sample_grid(pipeline: Audio2ImagePipeline, tokens: Callable[[int], Any], count: int, seed: int) -> ByteArray:
    """Sample grid uint8 [H, W, 3]: a column for each of the first pairs' sounds."""
    pictures = pipeline.generate_batch([tokens(row) for row in range(min(GRID_SOUNDS, count))], GRID_SAMPLES, seed=seed)
    return np.concatenate([np.concatenate(list(column), axis=0) for column in pictures], axis=1)


def build_scratch_recipe(
    config: TrainConfig,
    by_split: Split,
    views: dict[Tracks, list[AudioFeatures]],
    image: Callable[[str], ByteArray],
    codec_of: Callable[[torch.Tensor], Codec],
    assets: Path,
    digest: str,
) -> Recipe:
    """A small model on the pairs alone.

    Args:
        config: the stage's section.
        by_split: pairs of `train` and `val`.
        views: features of every sound's views.
        image: RGB uint8 [H, W, 3] by id.
        codec_of: the codec of training pictures [N, 3, H, W].
        assets: folder of the pretrained weights, of which the encoder's go into the export.
        digest: of the run.
    """
    torch.manual_seed(config.seed)
    conditioner = build_conditioner(config)
    known = [views[tracks] for tracks in distinct_sounds(by_split["train"])]
    conditioner.fit([view for sound in known for view in sound])
    conditioner.remember([sound[0] for sound in known])
    train, val = (paired_data(by_split[split], image, views, conditioner, config.picture_size) for split in ("train", "val"))
    codec = codec_of(train.pictures)
    psnr = {"codec_psnr_train_db": codec_psnr(codec, train.pictures), "codec_psnr_val_db": codec_psnr(codec, val.pictures)}
    denoiser = build_denoiser(config, conditioner)
    fit_prior(denoiser.prior, codec, train.pictures, config.picture, config.seed)
    scheduler = new_scheduler(config.drawing.shift)
    pipeline = Audio2ImageFlowPipeline(denoiser, codec, scheduler, None, generation_config(config))
    shown = val if len(val) else train
    counts = {"pairs_train": len(train), "pairs_val": len(val), "sounds_train": len(train.tokens)}
    return Recipe(
        module=DiffusionModule(config, denoiser, digest),
        stream=lambda first, share: ScratchBatches(train, codec, config, first, share),
        held_out=lambda: validation_batch(val, codec, config.seed),
        draw=lambda: sample_grid(pipeline, lambda row: shown.clean_tokens([row]), len(shown), config.seed),
        save=lambda target: save_model(target, denoiser, codec, scheduler, asdict(pipeline.defaults), assets),
        metrics={name: value for name, value in psnr.items() if value is not None} | counts,
    )


def build_adapter_recipe(
    config: TrainConfig,
    by_split: Split,
    views: dict[Tracks, list[torch.Tensor]],
    image: Callable[[str], ByteArray],
    encoder: GridEncoder,
    backbone: StableDiffusionBackbone,
    latents: ResultCache,
    assets: Path,
    digest: str,
) -> Recipe:
    """Audio for a frozen backbone.

    Args:
        views: grids of every sound's views.
        encoder: what made them.
        backbone: loaded here, and moved to where training will be.
        latents: memo of `LATENTS_SCHEMA`, marked by `latents_mark`.
        config, by_split, image, assets, digest: as in `scratch_recipe`.
    """
    backbone.load()
    torch.manual_seed(config.seed)
    adapter = build_adapter(config, backbone, encoder)
    backbone.to("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    train, val = (adapter_data(config, by_split[split], views, image, backbone, latents) for split in ("train", "val"))
    scheduler = backbone.scheduler("ddim" if config.drawing.solver == "ddim" else "dpm++")
    pipeline = AudioIPAdapterPipeline(adapter, scheduler, None, generation_config(config))
    shown = val if len(val) else train

    def tokens(row: int) -> AudioEmbeds:
        return pipeline.gather(shown.grids[shown.sounds[row]][0])

    return Recipe(
        module=AudioIPAdapterModule(config, adapter, digest),
        stream=lambda first, share: AdapterBatches(train, backbone, config, first, share),
        held_out=lambda: adapter_validation_batch(val, backbone, config.seed),
        draw=lambda: sample_grid(pipeline, tokens, len(shown), config.seed),
        save=lambda target: save_adapter(target, adapter, scheduler, encoder, asdict(pipeline.defaults), assets),
        metrics={"pairs_train": len(train), "pairs_val": len(val), "sounds_train": len(train.grids)},
    )
