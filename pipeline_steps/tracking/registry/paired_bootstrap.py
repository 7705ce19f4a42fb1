"""Is B better than A? Paired bootstrap over whole clusters of test items. Pure.

Both models were judged on the same items, so what varies from item to item (a hard sound, an odd picture) is in both and
drops out of the difference: its interval is far narrower than the two intervals beside each other suggest. Items that share
a sound are not independent; whole clusters are drawn (Efron & Tibshirani 1993, ch. 8 and 16.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline_steps.core.array_types import DoubleArray

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """B minus A on the same items.

    Attributes:
        value: mean difference.
        low, high: 95 % percentile interval; None with fewer than two clusters.
        p: two-sided bootstrap p-value of "no difference"; None with fewer than two clusters.
        n: items in both; `clusters`: independent groups among them.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    clusters: int


def paired_difference(
    a: Sequence[float] | DoubleArray, b: Sequence[float] | DoubleArray, clusters: Sequence[str], repeats: int, seed: int
) -> PairedDifference:
    """Mean of `b - a` over items [N], with interval and p-value.

    Args:
        a, b: one number per item, in the same order; an item that has no finite number on both sides is left out.
        clusters: cluster of each item.
        repeats: bootstrap repeats.
        seed: of the resampling.

    Raises:
        ValueError: lengths differ, or no item has a number on both sides.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) != len(clusters):
        raise ValueError(f"paired items need equal lengths, got {first.shape}, {second.shape}, {len(clusters)} clusters")
    gap = second - first
    known = np.isfinite(gap)
    if not known.any():
        raise ValueError("no item has a number on both sides")
    gap = gap[known]
    names, index = np.unique(np.asarray(clusters, dtype=str)[known], return_inverse=True)
    sums, sizes = np.bincount(index, weights=gap), np.bincount(index)
    value = float(gap.mean())
    if len(names) < 2:
        return PairedDifference(value, None, None, None, len(gap), len(names))
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(names), np.full(len(names), 1.0 / len(names)), size=repeats)
    return from_draws(value, (counts @ sums) / (counts @ sizes), len(gap), len(names))


def from_draws(value: float, draws: DoubleArray, n: int, clusters: int) -> PairedDifference:
    """A difference whose bootstrap draws [repeats] are known: both models' draws were made with the same resampling."""
    kept = draws[np.isfinite(draws)]
    if len(kept) < 2:
        return PairedDifference(value, None, None, None, n, clusters)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(edge) for edge in np.percentile(kept, [tail, 100 - tail]))
    return PairedDifference(value, low, high, two_sided_p(kept), n, clusters)


def two_sided_p(draws: DoubleArray) -> float:
    """Twice the share of draws on the far side of zero, never below 2 / (repeats + 1) (Davison & Hinkley 1997, section 4.2)."""
    below, above = int((draws <= 0).sum()), int((draws >= 0).sum())
    return min(1.0, 2.0 * (1 + min(below, above)) / (len(draws) + 1))
