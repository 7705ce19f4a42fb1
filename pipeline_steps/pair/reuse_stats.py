"""Reuse of pool clips: coverage, largest reuse, Gini coefficient, skewness, entropy of phrases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from pipeline_steps.core.array_types import IntArray
from pipeline_steps.core.statistics import gini, skewness


def reuse_metrics(chosen: IntArray, n_clips: int, n_images: int) -> dict[str, float | int]:
    """Coverage and reuse of an assignment; `chosen` is the clip of every image that has one."""
    uses = np.bincount(chosen, minlength=n_clips)
    return {
        "coverage": round(len(chosen) / n_images, 6) if n_images else 0.0,
        "audio_coverage": round(float((uses > 0).mean()), 6) if n_clips else 0.0,
        "max_reuse": int(uses.max()) if n_clips else 0,
        "gini": round(gini(uses), 6),
        "k_occurrence_skewness": round(skewness(uses), 6),
    }


def entropy_bits(items: Iterable[str]) -> float:
    """Shannon entropy of a histogram of names, in bits: log2 of the effective number of kinds."""
    counts = Counter(items)
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0
