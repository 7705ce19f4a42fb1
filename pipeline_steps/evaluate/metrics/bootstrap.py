"""Intervals by resampling whole clusters: items that share a sound recording or a picture group are not independent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline_steps.core.array_types import DoubleArray, IntArray

CONFIDENCE = 0.95
"""Level of every interval in the report."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number, its 95 % interval, and how many items and independent clusters it rests on.

    `low` and `high` are None when there are fewer than two clusters: then nothing can be said about the spread.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int


def cluster_index(clusters: Sequence[str]) -> tuple[IntArray, int]:
    """Number the clusters in sorted order: index [N] of each item's cluster, and how many clusters there are."""
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    return index.astype(np.int64), len(names)


def resample_counts(n_clusters: int, repeats: int, generator: np.random.Generator) -> IntArray:
    """How often each cluster is drawn in each bootstrap repeat: multinomial counts [repeats, n_clusters]."""
    return generator.multinomial(n_clusters, np.full(n_clusters, 1.0 / n_clusters), size=repeats).astype(np.int64)


def percentile_interval(draws: DoubleArray) -> tuple[float, float]:
    """The percentile interval of bootstrap draws [repeats] at level `CONFIDENCE`; draws without a value are left out."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws[np.isfinite(draws)], [tail, 100 - tail])
    return float(low), float(high)


def mean_estimate(values: Sequence[float] | DoubleArray, clusters: Sequence[str], repeats: int, seed: int) -> Estimate:
    """Mean of `values` [N] with a cluster-bootstrap percentile interval (Efron & Tibshirani 1993, ch. 8 and 13).

    Args:
        values: one number per item.
        clusters: cluster name per item; whole clusters are drawn with replacement.
        repeats: bootstrap repeats.
        seed: of the resampling.

    Raises:
        ValueError: no values, or lengths differ.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or len(array) != len(clusters):
        raise ValueError(f"mean_estimate needs one cluster per value, got {array.shape} values, {len(clusters)} clusters")
    index, n_clusters = cluster_index(clusters)
    value = float(array.mean())
    if n_clusters < 2:
        return Estimate(value, None, None, len(array), n_clusters)
    sums = np.bincount(index, weights=array, minlength=n_clusters)
    sizes = np.bincount(index, minlength=n_clusters)
    counts = resample_counts(n_clusters, repeats, np.random.default_rng(seed))
    low, high = percentile_interval((counts @ sums) / (counts @ sizes))
    return Estimate(value, low, high, len(array), n_clusters)
