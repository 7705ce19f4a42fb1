"""Audio of the sweeps: mixtures, levels, reverberation. Mono float32 samples [T] at 48 kHz."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.signal import fftconvolve

from pipeline_steps.audio.loudness import integrated_loudness
from pipeline_steps.audio.reverb import decaying_noise_response
from pipeline_steps.core.array_types import FloatArray

RATE = 48_000
LOUDNESS = -26.0
"""LUFS of every clip before a sweep changes it."""
PEAK = 0.99


def set_loudness(samples: FloatArray, lufs: float = LOUDNESS) -> FloatArray:
    """Clip at a loudness, less if its peak would exceed full scale; silence is returned unchanged."""
    loudness = integrated_loudness(samples, RATE)
    if not np.isfinite(loudness):
        return samples
    gain = 10.0 ** ((lufs - loudness) / 20.0)
    return np.asarray(samples * min(gain, PEAK / float(np.abs(samples).max())), np.float32)


def restore_level(samples: FloatArray, reference: FloatArray) -> FloatArray:
    """Clip at the root mean square of another one. Unlike a loudness with gates it does not depend on the level of the clip."""
    rms, wanted = (float(np.sqrt(np.mean(np.square(clip, dtype=np.float64)))) for clip in (samples, reference))
    return np.asarray(samples * (wanted / rms), np.float32) if rms > 0 else samples


def mixtures(first: FloatArray, second: FloatArray, gains_db: Sequence[float]) -> list[FloatArray]:
    """Two clips of equal loudness with the second one at each gain, every mixture at the same loudness."""
    base, added = set_loudness(first), set_loudness(second)
    added = np.resize(added, len(base))
    return [set_loudness(np.asarray(base + added * 10.0 ** (gain / 20.0), np.float32)) for gain in gains_db]


def levels(samples: FloatArray, gains_db: Sequence[float]) -> list[FloatArray]:
    """A clip at each gain relative to `LOUDNESS`; it starts lower if the highest gain would exceed full scale."""
    base = set_loudness(samples)
    highest = float(np.abs(base).max()) * 10.0 ** (max(gains_db) / 20.0)
    base = base * np.float32(min(1.0, PEAK / highest)) if highest > 0 else base
    return [np.asarray(base * np.float32(10.0 ** (gain / 20.0)), np.float32) for gain in gains_db]


def reverberant(samples: FloatArray, t60_seconds: Sequence[float], seed: int) -> list[FloatArray]:
    """A clip in rooms of each reverberation time, at the level of its direct sound.

    All rooms have the same noise (`decaying_noise_response`), and all clips end with the longest tail.
    """
    dry = pad_tail(samples, max(t60_seconds))
    rooms = [decaying_noise_response(t60, RATE, np.random.default_rng(seed)) for t60 in t60_seconds]
    return [np.asarray(fftconvolve(dry, room)[: len(dry)], np.float32) for room in rooms]


def pad_tail(samples: FloatArray, seconds: float) -> FloatArray:
    """A clip at `LOUDNESS` followed by silence."""
    return np.pad(set_loudness(samples), (0, int(seconds * RATE)))
