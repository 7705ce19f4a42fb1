"""Paired bootstrap of the difference between two models over clusters of test items. Pure.

Both models are evaluated on the same items. Variation between items cancels in the difference, so its interval is narrower than
the intervals of the two values. Items of one audio clip are not independent; whole clusters are resampled (Efron & Tibshirani
1993, ch. 8 and 16.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline_steps.core.array_types import DoubleArray

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """B minus A on the same items."""

    value: float  # mean difference
    low: float | None  # lower end of the 95 % percentile interval; None with fewer than two clusters
    high: float | None  # upper end of the interval
    p: float | None  # two-sided bootstrap p-value of "no difference"; None with fewer than two clusters
    n: int  # number of items
    clusters: int  # number of independent groups of items


def paired_difference(
    a: Sequence[float] | DoubleArray, b: Sequence[float] | DoubleArray, clusters: Sequence[str], repeats: int, seed: int
) -> PairedDifference:
    """Mean of `b - a` over items [N], with interval and p-value.

    Args:
        a, b: one number per item, in the same order; an item without two finite numbers is left out.
        clusters: cluster of each item.
        repeats: bootstrap repeats.
        seed: seed of the resampling.

    Raises:
        ValueError: lengths differ, or no item has two finite numbers.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) != len(clusters):
        raise ValueError(f"paired items need equal lengths, got {first.shape}, {second.shape}, {len(clusters)} clusters")
    difference = second - first
    finite = np.isfinite(difference)
    if not finite.any():
        raise ValueError("no item has a number on both sides")
    difference = difference[finite]
    names, index = np.unique(np.asarray(clusters, dtype=str)[finite], return_inverse=True)
    sums, sizes = np.bincount(index, weights=difference), np.bincount(index)
    value = float(difference.mean())
    if len(names) < 2:
        return PairedDifference(value, None, None, None, len(difference), len(names))
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(len(names), np.full(len(names), 1.0 / len(names)), size=repeats)
    return difference_from_bootstrap(value, (counts @ sums) / (counts @ sizes), len(difference), len(names))


def difference_from_bootstrap(value: float, replicates: DoubleArray, n: int, clusters: int) -> PairedDifference:
    """Difference with interval and p-value from bootstrap replicates [repeats] of it."""
    finite = replicates[np.isfinite(replicates)]
    if len(finite) < 2:
        return PairedDifference(value, None, None, None, n, clusters)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = (float(edge) for edge in np.percentile(finite, [tail, 100 - tail]))
    return PairedDifference(value, low, high, two_sided_p(finite), n, clusters)


def two_sided_p(replicates: DoubleArray) -> float:
    """Two-sided bootstrap p-value, at least 2 / (repeats + 1) (Davison & Hinkley 1997, section 4.2)."""
    below, above = int((replicates <= 0).sum()), int((replicates >= 0).sum())
    return min(1.0, 2.0 * (1 + min(below, above)) / (len(replicates) + 1))
