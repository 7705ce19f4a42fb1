"""May 8-bit vectors stand for float32 ones? Measured on the pool's own sounds before they are used, and never with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import FloatArray

SAMPLE = 256
"""Sounds of a pool that are embedded both ways, at most."""
FEWEST = 40
"""Below so many sounds ten neighbours say little, and there is no time to be saved either."""
NEIGHBOURS = 10


def calibration_sample(audio_ids: Sequence[str]) -> list[str]:
    """The sounds to measure on. Ids are hashes of content: their order is random, and a new sound displaces one at most."""
    return sorted(audio_ids)[:SAMPLE]


def neighbour_agreement(exact: FloatArray, quick: FloatArray) -> dict[str, Any]:
    """How well the rows of `quick` [N, D] stand for those of `exact` [N, D], both of unit length, N above 10.

    Texts stay in float32, so the float32 rows ask here as well: each of them ranks all other sounds, once by their rows of
    `exact`, once by those of `quick`. A network that turns all its vectors alike keeps its own neighbours and is still found.

    Returns:
        recall_at_10: share of queries whose nearest sound is among their ten nearest by `quick`: the recall@10 of one
            right answer, as on gold pairs. shared_at_10: share of the ten nearest that are the same by both.
            cosine_mean, cosine_min: of a sound's two vectors.
    """
    right = _nearest(exact @ exact.T)
    found = _nearest(exact @ quick.T)
    cosines = (exact.astype(np.float64) * quick).sum(1)
    shared = [len(np.intersect1d(one, other)) / NEIGHBOURS for one, other in zip(right, found, strict=True)]
    return {
        "sounds": len(exact),
        "recall_at_10": float(np.mean((found == right[:, :1]).any(1))),
        "shared_at_10": float(np.mean(shared)),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
    }


def _nearest(scores: FloatArray) -> np.ndarray:
    """The ten best others [N, 10] of each row of [N, N]; among equals the first."""
    others = np.where(np.eye(len(scores), dtype=bool), -np.inf, scores)
    return np.argsort(-others, axis=1, kind="stable")[:, :NEIGHBOURS]
