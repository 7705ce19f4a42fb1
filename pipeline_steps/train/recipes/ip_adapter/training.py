"""Assembly of recipe `ip_adapter`: frozen backbone, adapter, module and data."""

from __future__ import annotations

import torch

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.diffusion.audio_prompt import AudioPrompt
from pipeline_steps.diffusion.audio_tokens import AudioTokenizer
from pipeline_steps.diffusion.ip_adapter import AudioEmbeds, AudioIPAdapter
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
from pipeline_steps.diffusion.pipelines.ip_adapter import AudioIPAdapterPipeline, save_adapter
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.train.recipes.base import RecipeSettings, TrainingInputs, TrainingRun
from pipeline_steps.train.recipes.ip_adapter.config import BackboneConfig, IPAdapterConfig
from pipeline_steps.train.recipes.ip_adapter.data import (
    LATENT_COLUMNS,
    IPAdapterDataModule,
    StoredLatents,
    latents_fingerprint,
    load_or_encode_latents,
    load_pairs,
)
from pipeline_steps.train.recipes.ip_adapter.lightning_module import AudioIPAdapterModule
from pipeline_steps.train.sampling import generation_config, sample_grid


def build_backbone(config: BackboneConfig, settings: RecipeSettings) -> StableDiffusionBackbone:
    """Backbone in the precision of the run; its weights are not loaded yet."""
    dtype = torch.bfloat16 if settings.setup.precision == "bf16-mixed" else torch.float32
    return StableDiffusionBackbone(config.model, config.revision, dtype, root=settings.root)


def build_adapter(
    config: IPAdapterConfig, resolution: int, backbone: StableDiffusionBackbone, encoder: AudioTokenizer
) -> AudioIPAdapter:
    """Untrained adapter in a loaded backbone.

    Raises:
        ConfigError: resolution or prompt are not supported by the backbone.
    """
    multiple = backbone.stride * 2 ** (len(backbone.unet.config.block_out_channels) - 1)
    if resolution % multiple:
        raise ConfigError(
            f"train.resolution: {resolution} px are not supported by {config.backbone.model}", f"use a multiple of {multiple}"
        )
    if config.backbone.prompt and not backbone.has_text_encoder:
        raise ConfigError(
            f"train.ip_adapter.backbone.prompt: {config.backbone.model} has no text encoder", "set it to an empty text"
        )
    resampler = PerceiverResampler(encoder.width, encoder.bands, output_width=backbone.width, **config.resampler.model_dump())
    return AudioIPAdapter(backbone, resampler, AudioPrompt(config.backbone.prompt))


def prepare(
    config: IPAdapterConfig, settings: RecipeSettings, inputs: TrainingInputs, backbone: StableDiffusionBackbone
) -> TrainingRun:
    """Load the backbone, encode the images, and build the adapter."""
    setup, seed, encoder = settings.setup, settings.seed, inputs.encoder  # `inputs`, with all pairs, must not be kept
    backbone.load()
    torch.manual_seed(seed)
    adapter = build_adapter(config, settings.resolution, backbone, encoder)
    backbone.to(setup.device)
    hflip_prob = settings.image_augmentation.hflip_prob
    columns = LATENT_COLUMNS if config.sample_latents else LATENT_COLUMNS[:1]
    store = inputs.open_store(latents_fingerprint(backbone, settings.resolution, setup.accelerator, columns), columns)

    def latents(image_ids: list[str]) -> list[StoredLatents]:
        return load_or_encode_latents(backbone, store, inputs.image, image_ids, settings.resolution, hflip_prob > 0)

    train, validation = (load_pairs(inputs.pairs[split], inputs.features, latents) for split in ("train", "val"))
    adapter.cache_prompts()
    scheduler = backbone.build_scheduler("ddim" if settings.sampling.scheduler == "ddim" else "dpm++")
    pipeline = AudioIPAdapterPipeline(adapter, scheduler, None, generation_config(settings))
    shown = validation if len(validation) else train

    def embeds(row: int) -> AudioEmbeds:
        return pipeline.encode_tokens(shown.tokens[shown.clips[row]][0])

    return TrainingRun(
        module=AudioIPAdapterModule(
            adapter,
            config.snr_gamma,
            phase=config.phase,
            digest=inputs.digest,
            optimizer=settings.optimizer,
            seed=seed,
            max_nonfinite_steps=settings.max_nonfinite_steps,
        ),
        datamodule=IPAdapterDataModule(
            train, validation, adapter, config, hflip_prob, seed, setup.partition, setup.loader_arguments
        ),
        sample_grid=lambda: sample_grid(pipeline, embeds, len(shown), seed),
        export=lambda folder: save_adapter(folder, pipeline, encoder, settings.assets),
    )
