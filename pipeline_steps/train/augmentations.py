"""Views of a sound and of a picture. Pure: everything random comes from the generator given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len

from pipeline_steps.audio.reverb import apply_reverb
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.train.config import AudioEncodingConfig, ImageAugmentationConfig

ROOMS = 32
"""Rooms of a run."""
AUGMENT_VERSION = 1
"""Raised whenever a view changes: part of the memo's fingerprint."""


def augment_audio(
    samples: FloatArray,
    second: FloatArray | None,
    config: AudioEncodingConfig,
    rng: np.random.Generator,
    rooms: Sequence[FloatArray] = (),
) -> FloatArray:
    """A version of a sound [T]: other speed, another start (circular), another level, sometimes in one of the `rooms` (impulse
    responses), with noise or with a second sound.

    Level changes the loudness that the model hears on purpose: near and far dogs are dogs. A room changes no level.
    """
    speed = float(np.exp(rng.uniform(-config.speed, config.speed)))
    positions = np.linspace(0, len(samples) - 1, max(2, int(len(samples) / speed)))
    view = np.interp(positions, np.arange(len(samples)), samples)
    view = np.roll(view, int(rng.integers(len(view))))
    if config.reverb_share and rng.random() < config.reverb_share:
        view = apply_reverb(view, rooms[int(rng.integers(len(rooms)))])
    view *= 10.0 ** (rng.uniform(-config.gain_db, config.gain_db) / 20.0)
    power = float(np.sqrt(np.mean(view**2)))
    if rng.random() < config.noise_share:
        noise = coloured_noise(len(view), float(rng.uniform(0.0, 0.5)), rng)
        view = view + noise * power * 10.0 ** (-rng.uniform(8.0, 30.0) / 20.0)
    if second is not None and rng.random() < config.mix_share:
        other = np.resize(second, len(view)).astype(np.float64)
        loudness = float(np.sqrt(np.mean(other**2)))
        view = view + other * (power / max(loudness, 1e-6)) * 10.0 ** (-rng.uniform(10.0, 20.0) / 20.0)
    return np.clip(view, -1.0, 1.0).astype(np.float32)


def coloured_noise(length: int, slope: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Noise [length] of unit deviation whose amplitude falls as frequency^-slope: 0 is white, 0.5 pink."""
    fast = next_fast_len(length, real=True)  # a prime length would take a hundred times longer
    spectrum = np.fft.rfft(rng.standard_normal(fast))
    spectrum /= np.maximum(1.0, np.arange(len(spectrum))) ** slope
    noise: npt.NDArray[np.float64] = np.fft.irfft(spectrum, fast)[:length]
    return noise / max(float(noise.std()), 1e-9)


def augment_images(
    pictures: torch.Tensor, config: ImageAugmentationConfig, generator: torch.Generator, chosen: slice = slice(None)
) -> torch.Tensor:
    """Each picture [N, 3, H, W] mirrored or not, a little larger or smaller, a little moved; borders are continued.

    Only the `chosen` ones are made; what is drawn for each does not depend on which they are.
    """
    count = len(pictures)
    mirror = (torch.rand(count, generator=generator) < config.mirror)[chosen]
    size = torch.exp((torch.rand(count, generator=generator) * 2 - 1) * config.scale)[chosen]
    move = ((torch.rand(count, 2, generator=generator) * 2 - 1) * 2 * config.shift)[chosen]
    pictures = pictures[chosen]
    mirrored = torch.where(mirror[:, None, None, None], pictures.flip(3), pictures)
    if not config.scale and not config.shift:
        return mirrored
    transform = torch.zeros(len(pictures), 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = size
    transform[:, :, 2] = move
    grid = F.affine_grid(transform, list(pictures.shape), align_corners=False)
    return F.grid_sample(mirrored, grid, padding_mode="border", align_corners=False)
