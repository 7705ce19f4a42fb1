"""Pipeline of recipe `scratch`: rectified flow from audio to images, saved as a folder in the diffusers layout.

models/audio2image/
  model_index.json                 class, default sampling parameters, sha256 of every weight file
  unet/         config.json, diffusion_pytorch_model.safetensors    readable by UNet2DConditionModel.from_pretrained
  scheduler/    scheduler_config.json                               FlowMatchEulerDiscreteScheduler
  autoencoder/  config.json, model.safetensors
  conditioner/  config.json, model.safetensors
  mlp/          config.json, model.safetensors                      MLP denoiser
  prior/        config.json, model.safetensors                      Gaussian denoiser
  encoder/      meta.json, yamnet.safetensors, audioset_classes.csv copied from the assets
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from torch import nn

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.diffusion.audio_conditioner import AudioConditioner, ConditionerInput, collate
from pipeline_steps.diffusion.audio_features import extract_audio_features, preprocess_waveform
from pipeline_steps.diffusion.autoencoder import AUTOENCODERS, STRIDE, Autoencoder
from pipeline_steps.diffusion.denoiser import TIMESTEPS, Denoiser
from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser
from pipeline_steps.diffusion.pipelines.base import PIPELINES, Audio2ImagePipeline, GenerationConfig
from pipeline_steps.diffusion.pipelines.safetensors_io import (
    FORMAT,
    INDEX,
    RETRAIN,
    copy_encoder_weights,
    load_weights,
    read_json,
    read_model_index,
    write_weights,
)
from pipeline_steps.models.audio.yamnet import YamNet

CLASS_NAME = "Audio2ImageFlowPipeline"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
UNET_KEYS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "cross_attention_dim",
    "attention_head_dim",
    "norm_num_groups",
    "class_embed_type",
    "projection_class_embeddings_input_dim",
    "resnet_time_scale_shift",
)
"""Keys of the U-Net's config.json that are used; other keys are ignored."""
UNET_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
PREDICTION_TYPES = ("residual", "velocity")


@PIPELINES.register(CLASS_NAME)
class Audio2ImageFlowPipeline(Audio2ImagePipeline):
    """Model trained from scratch."""

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        encoder: YamNet | None,
        generation_config: GenerationConfig,
    ) -> None:
        self.denoiser = denoiser.eval()
        self.autoencoder = autoencoder.eval()
        self.scheduler = scheduler
        self.encoder = encoder
        self.generation_config = generation_config

    @classmethod
    def from_pretrained(cls, folder: Path, device: str | None = None) -> Self:
        """Load an exported folder; the default device is the CPU."""
        denoiser, autoencoder, index = load_model(folder)
        return cls(
            denoiser.to(device or "cpu"),
            autoencoder.to(device or "cpu"),
            new_scheduler(float(read_json(folder / "scheduler/scheduler_config.json").get("shift", 1.0))),
            YamNet(folder / "encoder").load(),
            GenerationConfig(**index["generation_config"]),
        )

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return self.denoiser.conditioner.position.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latents of one image."""
        side = self.generation_config.resolution // STRIDE
        return self.autoencoder.channels, side, side

    def encode_audio(self, samples_48k: FloatArray) -> ConditionerInput:
        """Encode a mono 48 kHz clip [T]; the result can be reused for any number of images.

        Raises:
            ValueError: the clip is empty, not mono, or not finite, or the pipeline has no encoder.
        """
        if self.encoder is None:
            raise ValueError("this pipeline has no audio encoder; pass encoded audio to generate_batch")
        samples = preprocess_waveform(samples_48k, self.generation_config.max_seconds)
        return self.denoiser.conditioner.encode_on_cpu(extract_audio_features(self.encoder, samples))

    def collate(self, embeds: list[ConditionerInput]) -> ConditionerInput:
        """Concatenate encoded clips into one batch."""
        return collate(embeds)

    def null_embeds(self, count: int) -> ConditionerInput:
        """Batch of `count` zero inputs; guidance scale 0 replaces them by the learned null tokens."""
        conditioner = self.denoiser.conditioner
        return ConditionerInput(
            torch.zeros(count, conditioner.num_time_tokens, conditioner.frame_in.in_features),
            torch.zeros(count, conditioner.summary_width),
        )

    def denoise(
        self, latents: torch.Tensor, condition: ConditionerInput, guidance_scale: float, num_inference_steps: int
    ) -> torch.Tensor:
        """Images float [N, 3, H, W] from initial latents [N, C, h, w], by Euler steps."""
        mask = torch.ones(len(condition), dtype=torch.bool, device=latents.device)
        conditional, unconditional = (self.denoiser.encode_condition(condition, given) for given in (mask, ~mask))
        # A copy, because diffusers' schedulers count their steps.
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas.tolist(), device=latents.device)
        for timestep in scheduler.timesteps:
            time = float(timestep) / TIMESTEPS
            velocity = self.denoiser.guided_velocity(latents, time, conditional, unconditional, guidance_scale)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        # During training the autoencoder stays on the CPU, where batches are made.
        return self.autoencoder.decode(latents.to(self.autoencoder.mean.device))


def new_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Euler scheduler; sigma becomes shift sigma / (1 + (shift - 1) sigma) (arXiv 2403.03206, eq. 23)."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=shift)


def save_model(folder: Path, pipeline: Audio2ImageFlowPipeline, assets: Path) -> None:
    """Write a model into a new folder. `model_index.json` is written last and marks the folder as complete."""
    denoiser, scheduler, autoencoder = pipeline.denoiser, pipeline.scheduler, pipeline.autoencoder
    unet_config = {key: denoiser.unet.config[key] for key in UNET_KEYS}
    write_json(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel", **unet_config})
    hashes = {UNET_WEIGHTS: write_weights(folder / UNET_WEIGHTS, denoiser.unet.state_dict())}
    write_json(
        folder / "scheduler/scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": TIMESTEPS, "shift": scheduler.config.shift},
    )
    parts: tuple[tuple[str, dict[str, Any], nn.Module], ...] = (
        ("autoencoder", {"type": autoencoder.name, "version": autoencoder.version}, autoencoder),
        ("conditioner", {"type": "audio"}, denoiser.conditioner),
        ("mlp", {"type": "mlp"}, denoiser.mlp),
        ("prior", {"type": "gaussian"}, denoiser.prior),
    )
    for name, config, module in parts:
        write_json(folder / name / "config.json", {**config, "settings": module.settings})
        hashes[f"{name}/model.safetensors"] = write_weights(folder / name / "model.safetensors", module.state_dict())
    copy_encoder_weights(assets, folder / "encoder")
    index = {
        "_class_name": CLASS_NAME,
        "format": FORMAT,
        "prediction_type": denoiser.prediction_type,
        "generation_config": asdict(pipeline.generation_config),
        "sha256": hashes,
    }
    write_json(folder / INDEX, index)


def load_model(folder: Path) -> tuple[Denoiser, Autoencoder, dict[str, Any]]:
    """Denoiser, autoencoder and index of a folder that `save_model` wrote, on the CPU.

    Raises:
        DataError: the folder or a file is missing.
        IntegrityError: a hash, key or shape differs, or a configuration is not allowed.
    """
    index = read_model_index(folder, CLASS_NAME)
    unet_config = read_json(folder / "unet/config.json")
    blocks = {*_strings(unet_config, "down_block_types"), *_strings(unet_config, "up_block_types")}
    if not blocks <= UNET_BLOCKS:
        raise IntegrityError(f"{folder / 'unet/config.json'}: unknown blocks {sorted(blocks - UNET_BLOCKS)}", RETRAIN)
    kind = read_json(folder / "autoencoder/config.json").get("type")
    if kind not in AUTOENCODERS:
        raise IntegrityError(f"{folder / 'autoencoder/config.json'}: unknown type {kind!r}", RETRAIN)
    if index.get("prediction_type") not in PREDICTION_TYPES:
        raise IntegrityError(f"{folder / INDEX}: unknown prediction_type {index.get('prediction_type')!r}", RETRAIN)

    def load(name: str, weights: str, module_class: Any, settings: dict[str, Any]) -> Any:
        try:
            module = module_class(**settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise IntegrityError(f"{folder / name / 'config.json'}: settings are not valid: {error}", RETRAIN) from error
        load_weights(folder / weights, module, index.get("sha256", {}).get(weights, ""))
        return module

    parts = {
        name: load(
            name, f"{name}/model.safetensors", module_class, dict(read_json(folder / name / "config.json").get("settings", {}))
        )
        for name, module_class in (
            ("autoencoder", AUTOENCODERS[str(kind)]),
            ("conditioner", AudioConditioner),
            ("mlp", MLPDenoiser),
            ("prior", GaussianDenoiser),
        )
    }
    unet = load("unet", UNET_WEIGHTS, UNet2DConditionModel, {key: unet_config[key] for key in UNET_KEYS if key in unet_config})
    denoiser = Denoiser(unet, parts["conditioner"], parts["mlp"], parts["prior"], index["prediction_type"])
    return denoiser, parts["autoencoder"], index


def _strings(config: dict[str, Any], key: str) -> list[str]:
    value = config.get(key, [])
    return [str(item) for item in value] if isinstance(value, list) else ["?"]
