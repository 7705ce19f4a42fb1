"""How evenly the sounds of the pool are used. All functions take `uses` [A]: how often each pool sound was chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def skewness(uses: Ints) -> float:
    """Third standardised moment of the k-occurrence (Radovanovic et al. 2010, JMLR 11, eq. 1); 0 if all are alike."""
    centred = uses - uses.mean() if len(uses) else np.zeros(1)
    spread = float(np.sqrt((centred**2).mean()))
    return float((centred**3).mean() / spread**3) if spread > 0 else 0.0


def gini(uses: Ints) -> float:
    """Gini coefficient of re-use over the pool: 0 all sounds used alike, towards 1 one sound used for everything."""
    total = int(uses.sum())
    if total == 0:
        return 0.0
    ordered = np.sort(uses)
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


def describe(chosen: Ints, n_sounds: int, n_pictures: int) -> dict[str, float | int]:
    """Coverage and re-use of one way to choose; `chosen` holds the sound of every picture that got one."""
    uses = np.bincount(chosen, minlength=n_sounds)
    return {
        "coverage": round(len(chosen) / n_pictures, 6) if n_pictures else 0.0,
        "pool_share": round(float((uses > 0).mean()), 6) if n_sounds else 0.0,
        "max_reuse": int(uses.max()) if n_sounds else 0,
        "gini": round(gini(uses), 6),
        "k_occurrence_skewness": round(skewness(uses), 6),
    }


def entropy_bits(items: Iterable[str]) -> float:
    """Shannon entropy of a histogram of names, in bits: how many kinds of sound the set really holds, as log2."""
    counts = Counter(items)
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0
