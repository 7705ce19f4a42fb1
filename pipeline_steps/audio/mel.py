"""Mel spectrograms of YAMNet and AISFX, equal to the features that these networks were trained on."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import FloatArray


def hann(length: int) -> npt.NDArray[np.float64]:
    """Periodic Hann window [length]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


def power_frames(samples: FloatArray, window: int, hop: int, fft: int, power: float) -> npt.NDArray[np.float64]:
    """|STFT|^power of whole frames, no centring: [1 + (T - window) // hop, fft // 2 + 1]."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    spectrum: npt.NDArray[np.float64] = np.abs(np.fft.rfft(frames * hann(window), fft))
    return spectrum if power == 1.0 else spectrum**power


@lru_cache(maxsize=4)
def yamnet_mel_matrix() -> npt.NDArray[np.float64]:
    """[257, 64] triangles in HTK mel between 125 and 7500 Hz, computed in mel (tf.signal.linear_to_mel_weight_matrix)."""
    bins = 1127.0 * np.log1p(np.linspace(0, 8000, 257)[1:] / 700.0)[:, None]
    edges = np.linspace(1127.0 * np.log1p(125.0 / 700.0), 1127.0 * np.log1p(7500.0 / 700.0), 66)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.maximum(0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    return np.pad(triangles, [[1, 0], [0, 0]])


def yamnet_log_mel(samples: FloatArray) -> FloatArray:
    """log(mel + 0.001) of a mono 16 kHz sound: 25 ms window, 10 ms hop, magnitude, 64 bands -> [frames, 64]."""
    magnitude = power_frames(samples, window=400, hop=160, fft=512, power=1.0)
    return np.log(magnitude @ yamnet_mel_matrix() + 0.001).astype(np.float32)


@lru_cache(maxsize=4)
def aisfx_mel_matrix() -> npt.NDArray[np.float64]:
    """[1025, 96] triangles in HTK mel between 0 and 22050 Hz, each summing to 1 (Essentia MelBands: warping, unit_sum)."""
    bins = 1127.0 * np.log1p(np.linspace(0, 22050, 1025) / 700.0)[:, None]
    edges = np.linspace(0.0, 1127.0 * np.log1p(22050 / 700.0), 98)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles: npt.NDArray[np.float64] = np.maximum(
        0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    )
    matrix: npt.NDArray[np.float64] = triangles / np.maximum(triangles.sum(0), 1e-12)
    return matrix


def aisfx_log_mel(samples: FloatArray) -> FloatArray:
    """log10(10000 mel + 1) of a mono 44.1 kHz sound: 2048 samples a frame, hop 1024, frames centred -> [frames, 96]."""
    padded = np.pad(samples, (1024, 1024))
    power = power_frames(padded, window=2048, hop=1024, fft=2048, power=2.0)
    return np.log10(power @ aisfx_mel_matrix() * 10_000.0 + 1.0).astype(np.float32)
