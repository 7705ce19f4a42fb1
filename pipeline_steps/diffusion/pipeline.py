"""Sound in, pictures out: the exported model as evaluation, the command line and the served model use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pipeline_steps.diffusion.codec import STRIDE, Codec
from pipeline_steps.diffusion.conditioning import SoundTokens, stack_tokens
from pipeline_steps.diffusion.denoiser import TIMESTEPS, Denoiser
from pipeline_steps.diffusion.features import prepare_waveform, sound_features
from pipeline_steps.diffusion.storage import ADAPTER_CLASS, exported_class, load_model, load_scheduler
from pipeline_steps.encoders.protocols import FloatArray
from pipeline_steps.encoders.yamnet import YamNet

BATCH = 48
Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DrawingDefaults:
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
    defaults: DrawingDefaults

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> Audio2ImagePipeline:
        """Read an exported folder of either recipe; hashes and shapes are checked, nothing is unpickled.

        Args:
            folder: what the stage `train` wrote.
            device: None is the CPU for the small model, and for an adapter the GPU where there is one.

        Raises:
            DataError: something is missing.
            IntegrityError: something is not what was exported.
        """
        folder = Path(folder)
        if exported_class(folder) == ADAPTER_CLASS:
            from pipeline_steps.diffusion.adapter_pipeline import AdapterPipeline

            return AdapterPipeline.read(folder, device)
        return ScratchPipeline.read(folder, device or "cpu")

    @property
    def families(self) -> frozenset[str]:
        """Families of models that shape the pictures: no judge may be of one."""
        return frozenset({self.encoder.family} if self.encoder is not None else ())

    @property
    def reads_text(self) -> bool:
        """Whether `draw_texts` can draw."""
        return False

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def hear(self, samples_48k: FloatArray) -> Any:
        """What is kept of one mono 48 kHz sound [T]; it may be drawn from many times.

        Raises:
            ValueError: empty, not mono, or not finite.
        """

    @abstractmethod
    def stack(self, tokens: list[Any]) -> Any:
        """One batch of several sounds that were heard."""

    @abstractmethod
    def draw_tokens(
        self,
        tokens: Any,
        draws: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Pictures:
        """Pictures uint8 [N, size, size, 3] of N sounds; row i starts from the noise of (seed, draws[i])."""

    @abstractmethod
    def draw_unconditional(self, count: int, seed: int = 0, steps: int | None = None) -> Pictures:
        """Pictures uint8 [count, size, size, 3] drawn with no sound given."""

    def draw(
        self,
        samples_48k: FloatArray,
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Pictures:
        """Pictures uint8 [num_samples, size, size, 3] of one mono 48 kHz sound [T].

        Args:
            samples_48k: float32 in [-1, 1]; never normalised: loudness is heard. The first `max_seconds` count.
            num_samples: how many; the k-th is the same whatever their number.
            seed: of the noise they start from.
            guidance_scale: 1 is the plain model, more follows the sound more closely, 0 ignores it; None takes the default.
            steps: of the solver; None takes the default.
        """
        pictures: Pictures = self.draw_many([self.hear(samples_48k)], num_samples, seed, guidance_scale, steps)[0]
        return pictures

    def draw_many(
        self,
        tokens: list[Any],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Pictures:
        """Pictures uint8 [N, num_samples, size, size, 3] of N sounds that were heard before; the fast way for many."""
        if not tokens:
            return np.zeros((0, num_samples, self.defaults.picture_size, self.defaults.picture_size, 3), np.uint8)
        stacked = self.stack([item for item in tokens for _ in range(num_samples)])
        pictures = self.draw_tokens(stacked, list(range(num_samples)) * len(tokens), seed, guidance_scale, steps)
        return pictures.reshape(len(tokens), num_samples, *pictures.shape[1:])

    def draw_texts(
        self,
        texts: list[str],
        num_samples: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Pictures:
        """Pictures uint8 [N, num_samples, size, size, 3] of N texts, with no sound: what the backbone alone makes of them.

        Raises:
            ValueError: the model reads no text (`reads_text`).
        """
        raise ValueError("this model reads no text: it was trained from scratch, or its backbone has no text encoder")


class ScratchPipeline(Audio2ImagePipeline):
    """The small model that is trained from scratch."""

    def __init__(
        self,
        denoiser: Denoiser,
        codec: Codec,
        scheduler: FlowMatchEulerDiscreteScheduler,
        encoder: YamNet | None,
        defaults: DrawingDefaults,
    ) -> None:
        self.denoiser = denoiser.eval()
        self.codec = codec.eval()
        self.scheduler = scheduler
        self.encoder = encoder
        self.defaults = defaults

    @classmethod
    def read(cls, folder: Path, device: str = "cpu") -> ScratchPipeline:
        """The pipeline of an exported folder."""
        denoiser, codec, index = load_model(folder)
        return cls(
            denoiser.to(device),
            codec.to(device),
            load_scheduler(folder),
            YamNet(folder / "encoder").load(),
            DrawingDefaults(**index["defaults"]),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.denoiser.conditioner.position.device

    def hear(self, samples_48k: FloatArray) -> SoundTokens:
        """Tokens of one mono 48 kHz sound [T]; they may be kept and drawn from many times.

        Raises:
            ValueError: empty, not mono, or not finite.
        """
        if self.encoder is None:
            raise ValueError("this pipeline was made without an encoder: give it tokens")
        samples = prepare_waveform(samples_48k, self.defaults.max_seconds)
        return self.denoiser.conditioner.cpu_tokens(sound_features(self.encoder, samples))

    def stack(self, tokens: list[SoundTokens]) -> SoundTokens:
        """One batch of several sounds that were heard."""
        return stack_tokens(tokens)

    def draw_unconditional(self, count: int, seed: int = 0, steps: int | None = None) -> Pictures:
        """Pictures uint8 [count, size, size, 3] drawn with no sound given."""
        conditioner = self.denoiser.conditioner
        empty = SoundTokens(
            torch.zeros(count, conditioner.frames, conditioner.frame_in.in_features),
            torch.zeros(count, conditioner.summary_width),
        )
        return self.draw_tokens(empty, list(range(count)), seed, 0.0, steps)

    @torch.inference_mode()
    def draw_tokens(
        self,
        tokens: SoundTokens,
        draws: list[int],
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Pictures:
        """Pictures uint8 [N, size, size, 3] of N token rows; row i starts from the noise of (seed, draws[i])."""
        guidance = self.defaults.guidance_scale if guidance_scale is None else guidance_scale
        count = self.defaults.steps if steps is None else steps
        side = self.defaults.picture_size // STRIDE
        noise = {k: starting_noise(seed, k, (self.codec.channels, side, side)) for k in set(draws)}
        pictures = []
        for start in range(0, len(draws), BATCH):
            rows = slice(start, start + BATCH)
            latents = torch.stack([noise[k] for k in draws[rows]]).to(self.device)
            latents = self._denoise(latents, tokens.select(rows).to(self.device), guidance, count)
            # While training, the denoiser is where Lightning puts it; the codec stays on the CPU, where batches are made.
            pictures.append(to_uint8(self.codec.decode(latents.to(self.codec.mean.device))))
        return np.concatenate(pictures)

    def _denoise(self, latents: torch.Tensor, tokens: SoundTokens, guidance_scale: float, steps: int) -> torch.Tensor:
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


def starting_noise(seed: int, draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal noise of a (seed, draw): the same for every sound, so that differences between pictures come from the sound."""
    return torch.randn(shape, generator=noise_generator(seed, draw))


def noise_generator(seed: int, draw: int) -> torch.Generator:
    """The generator of that noise, as a stock pipeline takes it."""
    entropy = np.random.SeedSequence([seed % 2**63, draw]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy) % 2**63)


def to_uint8(pictures: torch.Tensor) -> Pictures:
    """uint8 [N, H, W, 3] of float pictures [N, 3, H, W] in [-1, 1]."""
    values: Any = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return np.ascontiguousarray(values)
