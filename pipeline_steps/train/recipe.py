"""The recipes `scratch` and `adapter`: what each gives to the training loop, which is the same for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps.core.memo import Memo
from pipeline_steps.diffusion.adapter import SoundEmbeds
from pipeline_steps.diffusion.adapter_pipeline import AdapterPipeline
from pipeline_steps.diffusion.adapter_storage import save_adapter
from pipeline_steps.diffusion.backbone import Backbone
from pipeline_steps.diffusion.codec import Codec
from pipeline_steps.diffusion.features import SoundFeatures
from pipeline_steps.diffusion.grids import GridEncoder
from pipeline_steps.diffusion.pipeline import Audio2ImagePipeline, DrawingDefaults, ScratchPipeline
from pipeline_steps.diffusion.storage import new_scheduler, save_model
from pipeline_steps.train.adapter import AdapterStream, AdapterTraining, adapter_data, held_out_batch, new_adapter
from pipeline_steps.train.batches import Batch, BatchStream, ScratchStream, Share, paired_data, validation_batch
from pipeline_steps.train.callbacks import Picture
from pipeline_steps.train.codec_training import codec_psnr
from pipeline_steps.train.config import Config
from pipeline_steps.train.module import DiffusionTraining, fit_prior, new_conditioner, new_denoiser
from pipeline_steps.train.sounds import Tracks, distinct_sounds

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

    module: DiffusionTraining
    stream: Callable[[int, Share], BatchStream]
    held_out: Callable[[], Batch | None]
    draw: Callable[[], Picture]
    save: Callable[[Path], None]
    metrics: dict[str, Any]


def defaults_of(config: Config) -> DrawingDefaults:
    """What the exported model does when not told."""
    return DrawingDefaults(
        steps=config.drawing.steps,
        guidance_scale=config.drawing.guidance_scale,
        max_seconds=config.sound.max_seconds,
        picture_size=config.picture_size,
    )


def grid_of(pipeline: Audio2ImagePipeline, tokens: Callable[[int], Any], count: int, seed: int) -> Picture:
    """Sample grid uint8 [H, W, 3]: a column for each of the first pairs' sounds."""
    pictures = pipeline.draw_many([tokens(row) for row in range(min(GRID_SOUNDS, count))], GRID_SAMPLES, seed=seed)
    return np.concatenate([np.concatenate(list(column), axis=0) for column in pictures], axis=1)


def scratch_recipe(
    config: Config,
    by_split: Split,
    views: dict[Tracks, list[SoundFeatures]],
    image: Callable[[str], Picture],
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
    conditioner = new_conditioner(config)
    known = [views[tracks] for tracks in distinct_sounds(by_split["train"])]
    conditioner.fit([view for sound in known for view in sound])
    conditioner.remember([sound[0] for sound in known])
    train, val = (paired_data(by_split[split], image, views, conditioner, config.picture_size) for split in ("train", "val"))
    codec = codec_of(train.pictures)
    psnr = {"codec_psnr_train_db": codec_psnr(codec, train.pictures), "codec_psnr_val_db": codec_psnr(codec, val.pictures)}
    denoiser = new_denoiser(config, conditioner)
    fit_prior(denoiser.prior, codec, train.pictures, config.picture, config.seed)
    scheduler = new_scheduler(config.drawing.shift)
    pipeline = ScratchPipeline(denoiser, codec, scheduler, None, defaults_of(config))
    shown = val if len(val) else train
    counts = {"pairs_train": len(train), "pairs_val": len(val), "sounds_train": len(train.tokens)}
    return Recipe(
        module=DiffusionTraining(config, denoiser, digest),
        stream=lambda first, share: ScratchStream(train, codec, config, first, share),
        held_out=lambda: validation_batch(val, codec, config.seed),
        draw=lambda: grid_of(pipeline, lambda row: shown.clean_tokens([row]), len(shown), config.seed),
        save=lambda target: save_model(target, denoiser, codec, scheduler, asdict(pipeline.defaults), assets),
        metrics={name: value for name, value in psnr.items() if value is not None} | counts,
    )


def adapter_recipe(
    config: Config,
    by_split: Split,
    views: dict[Tracks, list[torch.Tensor]],
    image: Callable[[str], Picture],
    encoder: GridEncoder,
    backbone: Backbone,
    latents: Memo,
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
    adapter = new_adapter(config, backbone, encoder)
    backbone.to("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    train, val = (adapter_data(config, by_split[split], views, image, backbone, latents) for split in ("train", "val"))
    scheduler = backbone.scheduler("ddim" if config.drawing.solver == "ddim" else "dpm++")
    pipeline = AdapterPipeline(adapter, scheduler, None, defaults_of(config))
    shown = val if len(val) else train

    def tokens(row: int) -> SoundEmbeds:
        return pipeline.gather(shown.grids[shown.sounds[row]][0])

    return Recipe(
        module=AdapterTraining(config, adapter, digest),
        stream=lambda first, share: AdapterStream(train, backbone, config, first, share),
        held_out=lambda: held_out_batch(val, backbone, config.seed),
        draw=lambda: grid_of(pipeline, tokens, len(shown), config.seed),
        save=lambda target: save_adapter(target, adapter, scheduler, encoder, asdict(pipeline.defaults), assets),
        metrics={"pairs_train": len(train), "pairs_val": len(val), "sounds_train": len(train.grids)},
    )
