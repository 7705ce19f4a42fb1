"""Skewness and Gini coefficient of counts, and the floor of a win rate."""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import IntArray

CHANCE = 0.5
"""Win rate of a model that does not use the audio."""


def skewness(uses: IntArray) -> float:
    """Third standardised moment of the k-occurrence (Radovanovic et al. 2010, JMLR 11, eq. 1); 0 if all are equal."""
    centred = uses - uses.mean() if len(uses) else np.zeros(1)
    spread = float(np.sqrt((centred**2).mean()))
    return float((centred**3).mean() / spread**3) if spread > 0 else 0.0


def gini(uses: IntArray) -> float:
    """Gini coefficient of reuse over the pool: 0: all clips are used equally; near 1: one clip is used for everything."""
    total = int(uses.sum())
    if total == 0:
        return 0.0
    ordered = np.sort(uses)
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


def is_above_chance(low: float | None) -> bool:
    """Whether the 95 % interval of a win rate, which begins at `low`, lies above chance; False without an interval."""
    return low is not None and low > CHANCE
