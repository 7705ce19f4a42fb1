"""Agreement of 8-bit and float32 audio vectors, measured on clips of the pool without labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray

MAX_CLIPS = 256
"""Largest number of clips that are encoded both ways."""
MIN_CLIPS = 40
"""Smallest number of clips to compare: with fewer, the ten nearest are too large a part, and 8 bits save no time."""
NEIGHBORS = 10


def calibration_sample(audio_ids: Sequence[str]) -> list[str]:
    """Clips to compare: the `MAX_CLIPS` smallest ids.

    Ids are content hashes, so this is a random sample, and a new clip replaces at most one of them.
    """
    return sorted(audio_ids)[:MAX_CLIPS]


def neighbor_agreement(exact: FloatArray, quantized: FloatArray) -> dict[str, Any]:
    """Agreement of the nearest neighbors by `quantized` [N, D] and by `exact` [N, D], unit rows, N above 10.

    Texts stay in float32, so the queries are the float32 rows: each of them ranks all other clips, once by their rows of
    `exact` and once by those of `quantized`. A network that rotates all vectors alike keeps the neighbors among its own rows,
    and is detected nevertheless.

    Returns:
        recall_at_10: fraction of queries whose nearest clip is among their ten nearest by `quantized`: the recall@10 of one
            correct answer, as on labeled pairs. shared_at_10: fraction of the ten nearest that both have in common.
            cosine_mean, cosine_min: of the two vectors of a clip.
    """
    expected = _nearest(exact @ exact.T)
    found = _nearest(exact @ quantized.T)
    cosines = (exact.astype(np.float64) * quantized).sum(1)
    shared = [len(np.intersect1d(one, other)) / NEIGHBORS for one, other in zip(expected, found, strict=True)]
    return {
        "sounds": len(exact),
        "recall_at_10": float(np.mean((found == expected[:, :1]).any(1))),
        "shared_at_10": float(np.mean(shared)),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
    }


def _nearest(scores: FloatArray) -> IntArray:
    """The ten best other columns [N, 10] of each row of [N, N]; of equal scores the first."""
    others = np.where(np.eye(len(scores), dtype=bool), -np.inf, scores)
    return np.argsort(-others, axis=1, kind="stable")[:, :NEIGHBORS]
