"""Loudness, peak, silence and clipping of mono samples in [-1, 1]."""

from __future__ import annotations

import math
import warnings

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32] | npt.NDArray[np.float64]

BLOCK_SECONDS = 0.4
"""Gating block of ITU-R BS.1770-4, section 2: the shortest measurable duration."""

SILENT = -math.inf


def integrated_loudness(samples: Samples, sample_rate: int) -> float:
    """Integrated loudness in LUFS (ITU-R BS.1770-4) of mono `samples` [T]; -inf when nothing passes the -70 LUFS gate.

    A constant offset is removed first: it is inaudible, and its onset would ring in the weighting filter. Clips shorter than
    one gating block are repeated, because pyloudnorm rejects them.

    Raises:
        ValueError: samples are not one-dimensional, empty, or not finite (pyloudnorm would return a plausible number).
    """
    import pyloudnorm

    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"expected mono samples [T], got shape {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError("samples are not finite")
    centred = samples.astype(np.float64) - float(np.mean(samples, dtype=np.float64))
    shortest = math.ceil(BLOCK_SECONDS * sample_rate) + 1
    if len(centred) < shortest:
        centred = np.tile(centred, math.ceil(shortest / len(centred)))
    if not centred.any():
        return SILENT
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore")
        return float(pyloudnorm.Meter(sample_rate, block_size=BLOCK_SECONDS).integrated_loudness(centred))


def needs_tiling(length: int, sample_rate: int) -> bool:
    """Whether `integrated_loudness` must repeat a clip of `length` samples."""
    return length < math.ceil(BLOCK_SECONDS * sample_rate) + 1


def peak_dbfs(samples: Samples) -> float:
    """Largest magnitude in dB relative to full scale; -inf for digital silence."""
    peak = float(np.max(np.abs(samples), initial=0.0))
    return 20.0 * math.log10(peak) if peak > 0 else SILENT


def silence_ratio(samples: Samples, sample_rate: int, floor_dbfs: float = -60.0, frame_seconds: float = 0.02) -> float:
    """Fraction of frames whose RMS is below `floor_dbfs`, in 0..1. A last partial frame counts as a frame."""
    frame = max(1, round(frame_seconds * sample_rate))
    if not len(samples):
        return 1.0
    starts = np.arange(0, len(samples), frame)
    energy = np.add.reduceat(samples.astype(np.float64) ** 2, starts)
    lengths = np.diff(np.append(starts, len(samples)))
    return float(np.mean(energy / lengths < 10.0 ** (floor_dbfs / 10.0)))


def full_scale_level(subtype: str) -> float:
    """Magnitude from which a decoded sample of a libsndfile subtype is at full scale.

    The largest positive code of n-bit samples decodes to 1 - 2^-(n-1); G.711 mu-law tops out at 32124/32768 and A-law at
    32256/32768.
    """
    bits = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "ULAW": 0, "ALAW": 0}.get(subtype)
    if bits is None:
        return 1.0 - 2.0**-15
    if not bits:
        return 32124 / 32768 if subtype == "ULAW" else 32256 / 32768
    return 1.0 - 2.0 ** -(bits - 1)
