"""How evenly the sounds of the pool are used. All functions take `uses` [A]: how often each pool sound was chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from pipeline_steps.core.array_types import IntArray
from pipeline_steps.core.statistics import gini, skewness


def reuse_metrics(chosen: IntArray, n_sounds: int, n_pictures: int) -> dict[str, float | int]:
    """Coverage and re-use of one way to choose; `chosen` holds the sound of every picture that got one."""
    uses = np.bincount(chosen, minlength=n_sounds)
    return {
        "coverage": round(len(chosen) / n_pictures, 6) if n_pictures else 0.0,
        "audio_coverage": round(float((uses > 0).mean()), 6) if n_sounds else 0.0,
        "max_reuse": int(uses.max()) if n_sounds else 0,
        "gini": round(gini(uses), 6),
        "k_occurrence_skewness": round(skewness(uses), 6),
    }


def entropy_bits(items: Iterable[str]) -> float:
    """Shannon entropy of a histogram of names, in bits: how many kinds of sound the set really holds, as log2."""
    counts = Counter(items)
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0
