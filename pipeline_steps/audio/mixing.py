"""Tracks of a pair and their mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import FloatArray

Tracks = tuple[tuple[str, float], ...]
"""Audio id and gain in dB of each track of a pair."""


def pair_tracks(pair: Mapping[str, Any], decimals: int | None = None) -> Tracks:
    """Tracks of a row of the pair table; gains are rounded to `decimals` if given."""
    gains = (float(track["gain_db"]) for track in pair["tracks"])
    rounded = gains if decimals is None else (round(gain, decimals) for gain in gains)
    return tuple((str(track["audio_id"]), gain) for track, gain in zip(pair["tracks"], rounded, strict=True))


def mix_tracks(tracks: Sequence[tuple[FloatArray, float]]) -> FloatArray:
    """Mix tracks (samples [T], gain in dB). The result is as long as the first track and is not normalized.

    Shorter tracks are repeated.
    """
    length = len(tracks[0][0])
    total = np.zeros(length, np.float64)
    for samples, gain_db in tracks:
        total += np.resize(samples, length).astype(np.float64) * 10.0 ** (gain_db / 20.0)
    return np.clip(total, -1.0, 1.0).astype(np.float32)
