"""Assembly of recipe `scratch`: fitted conditioner, autoencoder and prior, then denoiser, module and data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline_steps.diffusion.audio_conditioner import AudioConditioner
from pipeline_steps.diffusion.autoencoder import STRIDE, Autoencoder
from pipeline_steps.diffusion.denoiser import Denoiser, build_unet
from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser
from pipeline_steps.diffusion.pipelines.scratch import Audio2ImageFlowPipeline, new_scheduler, save_model
from pipeline_steps.train.audio_feature_cache import distinct_clips
from pipeline_steps.train.augmentations import augment_images
from pipeline_steps.train.config_groups import ImageAugmentationConfig
from pipeline_steps.train.recipes.base import RecipeSettings, TrainingInputs, TrainingRun
from pipeline_steps.train.recipes.scratch.autoencoder_training import autoencoder_psnr, build_autoencoder, train_autoencoder
from pipeline_steps.train.recipes.scratch.config import ConditionerConfig, ScratchConfig
from pipeline_steps.train.recipes.scratch.data import ScratchDataModule, load_pairs
from pipeline_steps.train.recipes.scratch.lightning_module import ScratchModule
from pipeline_steps.train.sampling import generation_config, sample_grid

PRIOR_AUGMENTATIONS = 8
"""Augmentations of each image that the prior is fitted on."""


def build_conditioner(config: ConditionerConfig) -> AudioConditioner:
    """Untrained conditioner; its fixed part is fitted later."""
    return AudioConditioner(**config.model_dump())


def build_denoiser(config: ScratchConfig, resolution: int, conditioner: AudioConditioner) -> Denoiser:
    """Untrained denoiser; its prior is fitted later."""
    channels, size, objective = config.autoencoder.latent_channels, resolution // STRIDE, config.objective
    unet = build_unet(
        2 * channels if objective.prediction_type == "residual" else channels,
        channels,
        size,
        config.unet.block_out_channels,
        config.conditioner.hidden_dim,
        config.unet.attention_head_dim,
    )
    mlp = MLPDenoiser(
        channels,
        size,
        conditioner.summary_width,
        config.mlp_denoiser.hidden_dim,
        config.mlp_denoiser.num_blocks,
        config.conditioner.dropout,
    )
    prior = GaussianDenoiser(channels, size, objective.full_covariance_channels)
    return Denoiser(unet, conditioner, mlp, prior, objective.prediction_type)


def fit_prior(
    prior: GaussianDenoiser, autoencoder: Autoencoder, images: torch.Tensor, config: ImageAugmentationConfig, seed: int
) -> None:
    """Fit the prior on the latents of augmented training images [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        augmented = (augment_images(images, config, generator) for _ in range(PRIOR_AUGMENTATIONS))
        prior.fit(torch.cat([autoencoder.encode(batch) for batch in augmented]))


def _print_progress(max_steps: int) -> Callable[[int, float], None]:
    """Print the loss of the autoencoder every 100 steps."""

    def progress(step: int, loss: float) -> None:
        if step % 100 == 0 or step == max_steps:
            print(f"train: autoencoder step {step}/{max_steps}  loss {loss:.4f}", flush=True)

    return progress


def prepare(config: ScratchConfig, settings: RecipeSettings, inputs: TrainingInputs) -> TrainingRun:
    """Fit conditioner, autoencoder and prior, and build what is trained."""
    torch.manual_seed(settings.seed)
    conditioner = build_conditioner(config.conditioner)
    clips = [inputs.features[tracks] for tracks in distinct_clips(inputs.pairs["train"])]
    conditioner.fit([features for augmentations in clips for features in augmentations])
    conditioner.fill_memory([augmentations[0] for augmentations in clips])
    train, validation = (
        load_pairs(inputs.pairs[split], inputs.image, inputs.features, conditioner, settings.resolution)
        for split in ("train", "val")
    )
    autoencoder: Autoencoder = inputs.load_or_train(
        "autoencoder",
        lambda: build_autoencoder(config.autoencoder, settings.seed),
        lambda: train_autoencoder(
            train.images, config.autoencoder, settings.seed, _print_progress(config.autoencoder.max_steps)
        ),
    )
    denoiser = build_denoiser(config, settings.resolution, conditioner)
    fit_prior(denoiser.prior, autoencoder, train.images, settings.image_augmentation, settings.seed)
    pipeline = Audio2ImageFlowPipeline(
        denoiser, autoencoder, new_scheduler(settings.sampling.shift), None, generation_config(settings)
    )
    shown = validation if len(validation) else train
    psnr = {f"autoencoder_psnr_{name}_db": autoencoder_psnr(autoencoder, part.images)
            for name, part in (("train", train), ("val", validation))}  # fmt: skip
    return TrainingRun(
        module=ScratchModule(
            denoiser,
            config.phases,
            digest=inputs.digest,
            optimizer=settings.optimizer,
            seed=settings.seed,
            max_nonfinite_steps=settings.max_nonfinite_steps,
        ),
        datamodule=ScratchDataModule(
            train,
            validation,
            autoencoder,
            settings.image_augmentation,
            config.objective,
            config.phases,
            settings.seed,
            settings.setup.partition,
            settings.setup.loader_arguments,
        ),
        sample_grid=lambda: sample_grid(pipeline, lambda row: shown.original_inputs([row]), len(shown), settings.seed),
        export=lambda folder: save_model(folder, pipeline, settings.assets),
        metrics={name: value for name, value in psnr.items() if value is not None},
    )
