"""Synthetic signals that calibrate the activation ranges of a quantized audio network.

They do not come from a pool, so a vector depends on its clip and the network alone. They cover the range of recordings: silence
to full scale, noise of several spectra, steady and gliding tones, clicks, slow and fast envelopes, one event between pauses.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipeline_steps.core.array_types import FloatArray

VERSION = 1
"""Raised with every change of the signals."""
SIGNALS = 48


def calibration_signals(samples: int, rate: int) -> Iterator[FloatArray]:
    """`SIGNALS` mono signals of `samples` samples at `rate` Hz, identical at every call."""
    seconds = np.arange(samples) / rate
    for number in range(SIGNALS):
        random = np.random.Generator(np.random.PCG64([VERSION, number]))
        kind = number % 6
        if kind == 0:
            wave = _noise(random, samples)
        elif kind == 1:
            wave = _harmonics(random, seconds)
        elif kind == 2:
            low, high = np.sort(random.uniform(40, 0.45 * rate, 2))
            wave = np.sin(2 * np.pi * (low * seconds + (high - low) * seconds**2 / (2 * seconds[-1])))
        elif kind == 3:
            clicks = (random.random(samples) < random.uniform(1, 30) / rate) * random.standard_normal(samples)
            wave = np.convolve(clicks, np.exp(-np.arange(2_000) / random.uniform(20, 400)))[:samples]
        elif kind == 4:
            wave = 0.5 * _noise(random, samples) + _harmonics(random, seconds)
        else:  # one event between pauses
            begin, length = random.uniform(0, 0.7), random.uniform(0.02, 0.3)
            inside = (seconds > begin * seconds[-1]) & (seconds < (begin + length) * seconds[-1])
            wave = inside * (_harmonics(random, seconds) + 0.3 * _noise(random, samples))
        levels = np.abs(random.standard_normal(40)) ** random.uniform(0, 3)
        wave = wave * np.interp(seconds, np.linspace(0, seconds[-1], 40), levels)
        peak = 0.0 if number == SIGNALS - 1 else 10 ** random.uniform(-3, 0)  # the last one is silence
        yield np.asarray(peak * wave / max(float(np.abs(wave).max()), 1e-9), np.float32)


def _noise(random: np.random.Generator, samples: int) -> np.ndarray:
    """Noise with peak 1 whose spectrum falls with a random exponent between white and brown noise."""
    spectrum = np.fft.rfft(random.standard_normal(samples))
    spectrum *= np.arange(1.0, len(spectrum) + 1) ** -random.uniform(0, 1)
    wave = np.fft.irfft(spectrum, samples)
    return np.asarray(wave / np.abs(wave).max())


def _harmonics(random: np.random.Generator, seconds: np.ndarray) -> np.ndarray:
    """Tone with up to 20 harmonics and vibrato; its peak is at most 1."""
    pitch, depth, speed = random.uniform(50, 1500), random.uniform(0, 0.05), random.uniform(0.5, 8)
    phase = 2 * np.pi * pitch * seconds + pitch * depth / speed * np.sin(2 * np.pi * speed * seconds)
    weights = np.arange(1.0, random.integers(2, 21)) ** -random.uniform(0, 2)
    wave = sum(weight * np.sin(order * phase) for order, weight in enumerate(weights, 1))
    return np.asarray(wave / weights.sum())
