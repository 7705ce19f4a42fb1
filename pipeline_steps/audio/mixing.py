"""Several sounds as one: the only place where the tracks of a pair become samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline_steps.core.array_types import FloatArray


def mix_tracks(tracks: Sequence[tuple[FloatArray, float]]) -> FloatArray:
    """One sound of several tracks (samples [T], gain in dB): as long as the first, shorter ones repeated, never normalised."""
    length = len(tracks[0][0])
    total = np.zeros(length, np.float64)
    for samples, gain_db in tracks:
        total += np.resize(samples, length).astype(np.float64) * 10.0 ** (gain_db / 20.0)
    return np.clip(total, -1.0, 1.0).astype(np.float32)
