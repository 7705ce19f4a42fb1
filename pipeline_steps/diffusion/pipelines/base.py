"""Sound in, pictures out: the exported model as evaluation, the command line and the served model use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline_steps.core.array_types import ByteArray, FloatArray

BATCH = 48


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """What `draw` does when not told: number of steps, guidance, seconds of sound heard, side of the picture in px."""

    steps: int
    guidance_scale: float
    max_seconds: float
    picture_size: int


class Audio2ImagePipeline(ABC):
    """A model in use, whatever recipe made it. Same weights, sound, seed and settings give the same picture on one machine,
    whatever the batch's other members (up to floating-point rounding)."""

    encoder: Any
    """Model that hears; its `family` is what evaluation asks for."""
    defaults: GenerationConfig

    @property
    def families(self) -> frozenset[str]:
        """Families of models that shape the pictures: no judge may be of one."""
        return frozenset({self.encoder.family} if self.encoder is not None else ())

    @property
    def has_text_encoder(self) -> bool:
        """Whether `draw_texts` can draw."""
        return False

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def encode_audio(self, samples_48k: FloatArray) -> Any:
        """What is kept of one mono 48 kHz sound [T]; it may be drawn from many times.

        Raises:
            ValueError: empty, not mono, or not finite.
        """

    @abstractmethod
    def stack(self, tokens: list[Any]) -> Any:
        """One batch of several sounds that were heard."""

    @abstractmethod
    def generate_from_embeds(
        self,
        tokens: Any,
        draws: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> ByteArray:
        """Pictures uint8 [N, size, size, 3] of N sounds; row i starts from the noise of (seed, draws[i])."""

    @abstractmethod
    def generate_unconditional(self, count: int, seed: int = 0, steps: int | None = None) -> ByteArray:
        """Pictures uint8 [count, size, size, 3] drawn with no sound given."""

    def draw(
        self,
        samples_48k: FloatArray,
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> ByteArray:
        """Pictures uint8 [num_samples, size, size, 3] of one mono 48 kHz sound [T].

        Args:
            samples_48k: float32 in [-1, 1]; never normalised: loudness is heard. The first `max_seconds` count.
            num_samples: how many; the k-th is the same whatever their number.
            seed: of the noise they start from.
            guidance_scale: 1 is the plain model, more follows the sound more closely, 0 ignores it; None takes the default.
            steps: of the solver; None takes the default.
        """
        pictures: ByteArray = self.generate_batch([self.encode_audio(samples_48k)], num_samples, seed, guidance_scale, steps)[0]
        return pictures

    def generate_batch(
        self,
        tokens: list[Any],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> ByteArray:
        """Pictures uint8 [N, num_samples, size, size, 3] of N sounds that were heard before; the fast way for many."""
        if not tokens:
            return np.zeros((0, num_samples, self.defaults.picture_size, self.defaults.picture_size, 3), np.uint8)
        stacked = self.stack([item for item in tokens for _ in range(num_samples)])
        pictures = self.generate_from_embeds(stacked, list(range(num_samples)) * len(tokens), seed, guidance_scale, steps)
        return pictures.reshape(len(tokens), num_samples, *pictures.shape[1:])

    def generate_from_text(
        self,
        texts: list[str],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> ByteArray:
        """Pictures uint8 [N, num_samples, size, size, 3] of N texts, with no sound: what the backbone alone makes of them.

        Raises:
            ValueError: the model reads no text (`has_text_encoder`).
        """
        raise ValueError("this model reads no text: it was trained from scratch, or its backbone has no text encoder")


def initial_latents(seed: int, draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal noise of a (seed, draw): the same for every sound, so that differences between pictures come from the sound."""
    return torch.randn(shape, generator=latents_generator(seed, draw))


def latents_generator(seed: int, draw: int) -> torch.Generator:
    """The generator of that noise, as a stock pipeline takes it."""
    entropy = np.random.SeedSequence([seed % 2**63, draw]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy) % 2**63)


def to_uint8(pictures: torch.Tensor) -> ByteArray:
    """uint8 [N, H, W, 3] of float pictures [N, 3, H, W] in [-1, 1]."""
    values: Any = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.ascontiguousarray(values)
