"""Augmentation of audio clips. All randomness comes from the generator passed in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.fft import next_fast_len

from pipeline_steps.audio.reverb import apply_reverb
from pipeline_steps.core.array_types import DoubleArray, FloatArray
from pipeline_steps.train.config_groups import AudioEncodingConfig

NUM_ROOMS = 32
"""Simulated rooms per run."""
AUGMENT_VERSION = 1
"""Version of the audio augmentation, part of the cache fingerprint. Raise it whenever results change."""


def augment_audio(
    samples: FloatArray,
    second: FloatArray | None,
    config: AudioEncodingConfig,
    rng: np.random.Generator,
    impulse_responses: Sequence[FloatArray] = (),
) -> FloatArray:
    """Augment a clip [T]: speed, circular shift, reverberation, level, noise, and a second clip mixed in.

    The level changes on purpose, because loudness is part of the condition. Reverberation does not change it.
    """
    speed = float(np.exp(rng.uniform(-config.max_log_speed, config.max_log_speed)))
    positions = np.linspace(0, len(samples) - 1, max(2, int(len(samples) / speed)))
    augmented = np.interp(positions, np.arange(len(samples)), samples)
    augmented = np.roll(augmented, int(rng.integers(len(augmented))))
    if config.reverb_prob and rng.random() < config.reverb_prob:
        augmented = apply_reverb(augmented, impulse_responses[int(rng.integers(len(impulse_responses)))])
    augmented *= 10.0 ** (rng.uniform(-config.max_gain_db, config.max_gain_db) / 20.0)
    power = float(np.sqrt(np.mean(augmented**2)))
    if rng.random() < config.noise_prob:
        noise = colored_noise(len(augmented), float(rng.uniform(0.0, 0.5)), rng)
        augmented = augmented + noise * power * 10.0 ** (-rng.uniform(8.0, 30.0) / 20.0)
    if second is not None and rng.random() < config.mix_prob:
        other = np.resize(second, len(augmented)).astype(np.float64)
        loudness = float(np.sqrt(np.mean(other**2)))
        augmented = augmented + other * (power / max(loudness, 1e-6)) * 10.0 ** (-rng.uniform(10.0, 20.0) / 20.0)
    return np.clip(augmented, -1.0, 1.0).astype(np.float32)


def colored_noise(length: int, slope: float, rng: np.random.Generator) -> DoubleArray:
    """Noise [length] of unit deviation whose amplitude falls as frequency^-slope: 0 is white, 0.5 is pink."""
    fast = next_fast_len(length, real=True)  # FFTs of prime lengths are slow
    spectrum = np.fft.rfft(rng.standard_normal(fast))
    spectrum /= np.maximum(1.0, np.arange(len(spectrum))) ** slope
    noise: DoubleArray = np.fft.irfft(spectrum, fast)[:length]
    return noise / max(float(noise.std()), 1e-9)
