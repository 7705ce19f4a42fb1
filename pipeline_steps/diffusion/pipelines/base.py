"""Inference pipeline from audio to images: the interface of every exported model and its sampling arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.registry import Registry


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """Default sampling parameters, saved with the model.

    Attributes:
        num_inference_steps: steps of the scheduler.
        guidance_scale: of classifier-free guidance.
        max_seconds: seconds from the start of a clip that are used.
        resolution: side of an image in pixels.
    """

    num_inference_steps: int
    guidance_scale: float
    max_seconds: float
    resolution: int


class AudioConditionedPipeline(ABC):
    """Audio-to-image model of any recipe.

    Equal weights, audio, seed and sampling parameters give equal images on one machine, up to floating-point rounding that
    depends on the batch.

    Attributes:
        encoder: pretrained audio encoder; None if the pipeline gets encoded audio.
        generation_config: default sampling parameters.
        batch_size: images that are sampled together.
    """

    encoder: Any
    generation_config: GenerationConfig
    batch_size = 48

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: Path, device: str | None = None) -> Self:
        """Load an exported folder; see `AutoAudio2ImagePipeline.from_pretrained`."""

    @property
    def families(self) -> frozenset[str]:
        """Model families that shape the images. Judges of these families would be circular."""
        return frozenset({self.encoder.family} if self.encoder is not None else ())

    @property
    def has_text_encoder(self) -> bool:
        """Whether `generate_from_text` is supported."""
        return False

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the weights."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape [C, h, w] of the latents of one image."""

    @abstractmethod
    def encode_audio(self, samples_48k: FloatArray) -> Any:
        """Encode a mono 48 kHz clip [T]; the result can be reused for any number of images.

        Raises:
            ValueError: the clip is empty, not mono, or not finite.
        """

    def encode_mixture(self, samples_48k: FloatArray, tracks: Sequence[FloatArray]) -> Any:
        """Encode a mixture [T] whose tracks, each [T] at its gain, are known. By default the tracks are not used."""
        return self.encode_audio(samples_48k)

    @abstractmethod
    def collate(self, embeds: list[Any]) -> Any:
        """Concatenate encoded clips into one batch."""

    @abstractmethod
    def null_embeds(self, count: int) -> Any:
        """Batch of `count` placeholders for missing audio."""

    @abstractmethod
    def denoise(self, latents: torch.Tensor, condition: Any, guidance_scale: float, num_inference_steps: int) -> torch.Tensor:
        """Images float [N, 3, H, W] in [-1, 1] from initial latents [N, C, h, w] and their condition."""

    def __call__(
        self,
        samples_48k: FloatArray,
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> ByteArray:
        """Generate images uint8 [num_samples, H, W, 3] from a mono 48 kHz clip [T].

        Args:
            samples_48k: float32 in [-1, 1], not normalized: the level is part of the condition. At most `max_seconds` are used.
            num_samples: number of images; image k does not depend on it.
            seed: of the initial noise.
            guidance_scale: 1 samples the conditional model, larger values follow the audio more closely, 0 ignores it. None
                selects the default.
            num_inference_steps: steps of the scheduler; None selects the default.
        """
        embeds = [self.encode_audio(samples_48k)]
        images: ByteArray = self.generate_batch(embeds, num_samples, seed, guidance_scale, num_inference_steps)[0]
        return images

    def generate_batch(
        self,
        embeds: list[Any],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> ByteArray:
        """Generate images uint8 [N, num_samples, H, W, 3] from N encoded clips."""
        size = self.generation_config.resolution
        if not embeds:
            return np.zeros((0, num_samples, size, size, 3), np.uint8)
        batch = self.collate([item for item in embeds for _ in range(num_samples)])
        indices = list(range(num_samples)) * len(embeds)
        images = self.generate_from_embeds(batch, indices, seed, guidance_scale, num_inference_steps)
        return images.reshape(len(embeds), num_samples, *images.shape[1:])

    def generate_from_embeds(
        self,
        embeds: Any,
        sample_indices: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> ByteArray:
        """Generate images uint8 [N, H, W, 3] from a batch of encoded clips; row i uses noise (seed, sample_indices[i])."""
        return to_uint8(self.sample_images(embeds, sample_indices, seed, guidance_scale, num_inference_steps))

    def generate_unconditional(self, count: int, seed: int = 0, num_inference_steps: int | None = None) -> ByteArray:
        """Generate images uint8 [count, H, W, 3] without audio."""
        return self.generate_from_embeds(self.null_embeds(count), list(range(count)), seed, 0.0, num_inference_steps)

    def generate_from_text(
        self,
        texts: list[str],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> ByteArray:
        """Generate images uint8 [N, num_samples, H, W, 3] from N texts without audio.

        Raises:
            ValueError: the model has no text encoder.
        """
        raise ValueError("this model has no text encoder; generate images from audio instead")

    def generate_from_audio_and_text(
        self,
        embeds: list[Any],
        text: str,
        audio_scale: float,
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> ByteArray:
        """Generate images uint8 [N, num_samples, H, W, 3] from N encoded clips beside a text.

        Args:
            audio_scale: weight of the audio, 0: the text alone, 1: as trained.

        Raises:
            ValueError: the model has no text encoder.
        """
        raise ValueError("this model has no text encoder; generate images from audio instead")

    @torch.inference_mode()
    def sample_images(
        self,
        condition: Any,
        sample_indices: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
    ) -> torch.Tensor:
        """Images float [N, 3, H, W] in [-1, 1] on the CPU, for a condition of N rows."""
        config = self.generation_config
        guidance = config.guidance_scale if guidance_scale is None else guidance_scale
        steps = config.num_inference_steps if num_inference_steps is None else num_inference_steps
        images = []
        for start in range(0, len(sample_indices), self.batch_size):
            rows = slice(start, start + self.batch_size)
            latents = torch.stack([initial_latents(seed, index, self.latent_shape) for index in sample_indices[rows]])
            images.append(self.denoise(latents.to(self.device), condition.select(rows).to(self.device), guidance, steps).cpu())
        return torch.cat(images)


PIPELINES: Registry[type[AudioConditionedPipeline]] = Registry("pipeline", "pipeline_steps.diffusion.pipelines")
"""Pipelines by the `_class_name` of their exported folder."""


def initial_latents(seed: int, sample_index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise of (seed, sample_index). It is equal for every clip, so that only the audio differs."""
    return torch.randn(shape, generator=latents_generator(seed, sample_index))


def latents_generator(seed: int, sample_index: int) -> torch.Generator:
    """Generator of `initial_latents`, for the argument `generator` of a stock pipeline."""
    entropy = np.random.SeedSequence([seed % 2**63, sample_index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy) % 2**63)


def interpolate_embeds(first: Any, second: Any, fraction: float) -> Any:
    """Encoded clip between two encoded clips (dataclasses of tensors [N, ..., width]): `slerp` of every token."""
    values = {field.name: (getattr(first, field.name), getattr(second, field.name)) for field in fields(first)}
    return replace(first, **{name: slerp(*pair, fraction) for name, pair in values.items()})


def slerp(first: torch.Tensor, second: torch.Tensor, fraction: float) -> torch.Tensor:
    """Spherical interpolation of the directions along the last axis (Shoemake 1985); norms are interpolated linearly."""
    norms = [tensor.norm(dim=-1, keepdim=True) for tensor in (first, second)]
    units = [tensor / norm.clamp_min(1e-12) for tensor, norm in zip((first, second), norms, strict=True)]
    angle = (units[0] * units[1]).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    plain = sine < 1e-4  # parallel or opposite: no plane to rotate in
    weights = [torch.where(plain, part, (part * angle).sin() / sine.clamp_min(1e-4)) for part in (1 - fraction, fraction)]
    direction = weights[0] * units[0] + weights[1] * units[1]
    interpolated: torch.Tensor = direction * ((1 - fraction) * norms[0] + fraction * norms[1])
    return interpolated


def classifier_free_guidance(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance u + g (c - u) (Ho & Salimans 2022, arXiv 2207.12598); g = 1 is the conditional model."""
    return unconditional + guidance_scale * (conditional - unconditional)


def to_uint8(images: torch.Tensor) -> ByteArray:
    """Convert float [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    values: Any = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.ascontiguousarray(values)
