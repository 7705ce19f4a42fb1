"""Sound in, pictures out, by a frozen backbone and an audio adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline_steps.diffusion.adapter import AudioAdapter, SoundEmbeds, stack_grids
from pipeline_steps.diffusion.adapter_storage import load_adapter
from pipeline_steps.diffusion.flow import guide
from pipeline_steps.diffusion.grids import GridEncoder
from pipeline_steps.diffusion.pipeline import Audio2ImagePipeline, DrawingDefaults, Pictures, starting_noise, to_uint8
from pipeline_steps.encoders.protocols import FloatArray

BATCH = 8
"""Pictures drawn together; guidance doubles it."""


class AdapterPipeline(Audio2ImagePipeline):
    """`Audio2ImagePipeline` of the recipe `adapter`.

    Args:
        adapter: in its loaded backbone.
        scheduler: a diffusers scheduler whose configuration is taken.
        encoder: None if sounds come as grids.
        defaults: of drawing.
    """

    def __init__(
        self, adapter: AudioAdapter, scheduler: object, encoder: GridEncoder | None, defaults: DrawingDefaults
    ) -> None:
        self.adapter = adapter.eval()
        self.scheduler = scheduler
        self.encoder = encoder
        self.defaults = defaults

    @classmethod
    def read(cls, folder: Path, device: str | None = None) -> AdapterPipeline:
        """The pipeline of an exported folder; on a GPU the frozen weights are bfloat16."""
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if place.startswith("cuda") else torch.float32
        adapter, scheduler, encoder, index = load_adapter(folder, dtype)
        adapter.backbone.to(place)
        if dtype is torch.bfloat16:
            adapter.backbone.unet.to(memory_format=torch.channels_last)
        return cls(adapter.to(place), scheduler, encoder, DrawingDefaults(**index["defaults"]))

    @property
    def reads_text(self) -> bool:
        """Whether the backbone has a text encoder."""
        return self.adapter.backbone.reads_text

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.adapter.device

    def hear(self, samples_48k: FloatArray) -> SoundEmbeds:
        """Embeddings of one mono 48 kHz sound [T].

        Raises:
            ValueError: empty, not mono, or not finite.
        """
        if self.encoder is None:
            raise ValueError("this pipeline was made without an encoder: give it grids")
        return self.gather(self.encoder.grids([samples_48k], self.defaults.max_seconds)[0])

    @torch.no_grad()
    def gather(self, grid: torch.Tensor) -> SoundEmbeds:
        """Embeddings of one grid [moments, bands, width]. One a call: they do not depend on the length of others."""
        return SoundEmbeds(self.adapter.listen(stack_grids([grid]).to(self.device)).cpu())

    def stack(self, tokens: list[SoundEmbeds]) -> SoundEmbeds:
        """One batch of several sounds that were heard."""
        return SoundEmbeds(torch.cat([item.embeds for item in tokens]))

    def ip_adapter_image_embeds(self, samples_48k: FloatArray) -> list[torch.Tensor]:
        """The argument of that name for a stock StableDiffusionPipeline with `ip_adapter.safetensors` loaded: [2, 1, count,
        inner], first of no sound (for guidance), then of this one."""
        embeds = self.hear(samples_48k).embeds
        return [torch.cat([self._silence(1).cpu(), embeds])[:, None]]

    def draw_tokens(
        self,
        tokens: SoundEmbeds,
        draws: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Pictures:
        """Pictures uint8 [N, size, size, 3] of N sounds; row i starts from the noise of (seed, draws[i])."""
        text = self.adapter.text(self.adapter.prompt).expand(len(tokens), -1, -1)
        return to_uint8(self.render(tokens, text, draws, seed, guidance_scale, steps))

    def draw_unconditional(self, count: int, seed: int = 0, steps: int | None = None) -> Pictures:
        """Pictures uint8 [count, size, size, 3] drawn with no sound and no text."""
        return self.draw_tokens(SoundEmbeds(self._silence(count)), list(range(count)), seed, 0.0, steps)

    def draw_texts(
        self,
        texts: list[str],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Pictures:
        """Pictures uint8 [N, num_samples, size, size, 3] of N texts by the backbone alone: the adapter's attention is left out.

        Raises:
            ValueError: the backbone reads no text.
        """
        if not self.reads_text:
            return super().draw_texts(texts, num_samples, seed, guidance_scale, steps)
        if not texts:
            return np.zeros((0, num_samples, self.defaults.picture_size, self.defaults.picture_size, 3), np.uint8)
        text = self.adapter.backbone.text(texts).repeat_interleave(num_samples, 0)
        self.adapter.set_scale(0.0)
        try:
            draws = list(range(num_samples)) * len(texts)
            pictures = self.render(SoundEmbeds(self._silence(len(draws))), text, draws, seed, guidance_scale, steps)
        finally:
            self.adapter.set_scale(1.0)
        return to_uint8(pictures).reshape(len(texts), num_samples, *pictures.shape[2:], 3)

    @torch.inference_mode()
    def render(
        self,
        tokens: SoundEmbeds,
        text: torch.Tensor,
        draws: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> torch.Tensor:
        """Pictures float32 [N, 3, size, size] in [-1, 1] of N sounds, each with its text tokens [N, L, width]."""
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        count = self.defaults.steps if steps is None else steps
        backbone = self.adapter.backbone
        side = self.defaults.picture_size // backbone.stride
        pictures = []
        for start in range(0, len(draws), BATCH):
            rows = slice(start, start + BATCH)
            noise = torch.stack([starting_noise(seed, k, (backbone.channels, side, side)) for k in draws[rows]])
            given = text[rows].to(self.device), tokens.select(rows).embeds.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=backbone.dtype == torch.bfloat16):
                latents = self._denoise(noise.to(self.device), *given, guidance, count)
            pictures.append(backbone.decode(latents.float()).cpu())
        return torch.cat(pictures)

    def _silence(self, count: int) -> torch.Tensor:
        return self.adapter.resampler.silence.detach().expand(count, -1, -1)

    def _denoise(
        self, latents: torch.Tensor, text: torch.Tensor, embeds: torch.Tensor, guidance_scale: float, steps: int
    ) -> torch.Tensor:
        count = len(latents)
        if guidance_scale != 1.0:
            no_text, no_sound = self.adapter.text("").expand(count, -1, -1), self._silence(count).to(embeds)
            text, embeds = torch.cat([no_text, text]), torch.cat([no_sound, embeds])
            if guidance_scale == 0.0:
                text, embeds = no_text, no_sound
        twice = len(text) > count
        # A fresh copy: diffusers' schedulers count their own steps.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # type: ignore[attr-defined]
        scheduler.set_timesteps(steps, device=latents.device)
        latents = latents * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            seen = scheduler.scale_model_input(torch.cat([latents, latents]) if twice else latents, timestep)
            answer = self.adapter.predict(seen, timestep.expand(len(seen)), text, embeds).float()
            if twice:
                withheld, given = answer.chunk(2)
                answer = guide(given, withheld, guidance_scale)
            latents = scheduler.step(answer, timestep, latents, return_dict=False)[0]
        return latents
