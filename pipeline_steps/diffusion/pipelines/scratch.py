"""Pipeline of recipe `scratch`: rectified flow from audio to images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.diffusion.audio_conditioner import ConditionerInput, collate
from pipeline_steps.diffusion.audio_features import extract_audio_features, preprocess_waveform
from pipeline_steps.diffusion.autoencoder import STRIDE, Codec
from pipeline_steps.diffusion.denoiser import TIMESTEPS, Denoiser
from pipeline_steps.diffusion.pipelines.base import BATCH, Audio2ImagePipeline, GenerationConfig, initial_latents, to_uint8
from pipeline_steps.diffusion.pipelines.safetensors_io import load_model, load_scheduler
from pipeline_steps.models.audio.yamnet import YamNet


class Audio2ImageFlowPipeline(Audio2ImagePipeline):
    """The small model that is trained from scratch."""

    def __init__(
        self,
        denoiser: Denoiser,
        codec: Codec,
        scheduler: FlowMatchEulerDiscreteScheduler,
        encoder: YamNet | None,
        defaults: GenerationConfig,
    ) -> None:
        self.denoiser = denoiser.eval()
        self.codec = codec.eval()
        self.scheduler = scheduler
        self.encoder = encoder
        self.defaults = defaults

    @classmethod
    def read(cls, folder: Path, device: str = "cpu") -> Audio2ImageFlowPipeline:
        """The pipeline of an exported folder."""
        denoiser, codec, index = load_model(folder)
        return cls(
            denoiser.to(device),
            codec.to(device),
            load_scheduler(folder),
            YamNet(folder / "encoder").load(),
            GenerationConfig(**index["defaults"]),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.denoiser.conditioner.position.device

    def encode_audio(self, samples_48k: FloatArray) -> ConditionerInput:
        """Tokens of one mono 48 kHz sound [T]; they may be kept and drawn from many times.

        Raises:
            ValueError: empty, not mono, or not finite.
        """
        if self.encoder is None:
            raise ValueError("this pipeline was made without an encoder: give it tokens")
        samples = preprocess_waveform(samples_48k, self.defaults.max_seconds)
        return self.denoiser.conditioner.encode_on_cpu(extract_audio_features(self.encoder, samples))

    def stack(self, tokens: list[ConditionerInput]) -> ConditionerInput:
        """One batch of several sounds that were heard."""
        return collate(tokens)

    def generate_unconditional(self, count: int, seed: int = 0, steps: int | None = None) -> ByteArray:
        """Pictures uint8 [count, size, size, 3] drawn with no sound given."""
        conditioner = self.denoiser.conditioner
        empty = ConditionerInput(
            torch.zeros(count, conditioner.frames, conditioner.frame_in.in_features),
            torch.zeros(count, conditioner.summary_width),
        )
        return self.generate_from_embeds(empty, list(range(count)), seed, 0.0, steps)

    @torch.inference_mode()
    def generate_from_embeds(
        self,
        tokens: ConditionerInput,
        draws: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> ByteArray:
        """Pictures uint8 [N, size, size, 3] of N token rows; row i starts from the noise of (seed, draws[i])."""
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        count = self.defaults.steps if steps is None else steps
        side = self.defaults.picture_size // STRIDE
        noise = {k: initial_latents(seed, k, (self.codec.channels, side, side)) for k in set(draws)}
        pictures = []
        for start in range(0, len(draws), BATCH):
            rows = slice(start, start + BATCH)
            latents = torch.stack([noise[k] for k in draws[rows]]).to(self.device)
            latents = self._denoise(latents, tokens.select(rows).to(self.device), guidance, count)
            # While training, the denoiser is where Lightning puts it; the codec stays on the CPU, where batches are made.
            pictures.append(to_uint8(self.codec.decode(latents.to(self.codec.mean.device))))
        return np.concatenate(pictures)

    def _denoise(self, latents: torch.Tensor, tokens: ConditionerInput, guidance_scale: float, steps: int) -> torch.Tensor:
        heard = torch.ones(len(tokens), dtype=torch.bool, device=latents.device)
        given, withheld = self.denoiser.listen(tokens, heard), self.denoiser.listen(tokens, ~heard)
        # A fresh copy: diffusers' schedulers count their own steps.
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), device=latents.device)
        for timestep in scheduler.timesteps:
            time = float(timestep) / TIMESTEPS
            velocity = self.denoiser.guided_velocity(latents, time, given, withheld, guidance_scale)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents
