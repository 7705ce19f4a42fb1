"""Cluster bootstrap: intervals by resampling whole clusters, because items of one cluster are not independent.

Items that share a recording, or an image group, are one cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline_steps.core.array_types import DoubleArray, IntArray

CONFIDENCE = 0.95
"""Level of every interval in the report."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval, the number of items and the number of independent clusters.

    `low` and `high` are None if there are fewer than two clusters: their spread is unknown.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int

    def entry(self) -> dict[str, float | int | None]:
        """Entry of `evaluation.json`, rounded to six decimals."""
        low, high = (None if bound is None else round(bound, 6) for bound in (self.low, self.high))
        return {"value": round(self.value, 6), "low": low, "high": high, "n": self.n, "clusters": self.clusters}


def cluster_index(clusters: Sequence[str]) -> tuple[IntArray, int]:
    """Number of each item's cluster [N] in sorted order, and the number of clusters."""
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    return index.astype(np.int64), len(names)


def resample_counts(n_clusters: int, num_bootstrap: int, generator: np.random.Generator) -> IntArray:
    """Multinomial counts [num_bootstrap, n_clusters]: how often each resample contains each cluster."""
    return generator.multinomial(n_clusters, np.full(n_clusters, 1.0 / n_clusters), size=num_bootstrap).astype(np.int64)


def percentile_interval(resampled: DoubleArray) -> tuple[float, float]:
    """Percentile interval of bootstrap values at level `CONFIDENCE`; values that are not finite are left out."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled[np.isfinite(resampled)], [tail, 100 - tail])
    return float(low), float(high)


def mean_estimate(values: Sequence[float] | DoubleArray, clusters: Sequence[str], num_bootstrap: int, seed: int) -> Estimate:
    """Mean of `values` with a cluster-bootstrap percentile interval (Efron & Tibshirani 1993, ch. 8 and 13).

    Args:
        values: one number per item, [N].
        clusters: cluster of each item; whole clusters are resampled with replacement.
        num_bootstrap: number of resamples.
        seed: of the resampling.

    Raises:
        ValueError: there are no values, or the lengths differ.
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
    counts = resample_counts(n_clusters, num_bootstrap, np.random.default_rng(seed))
    low, high = percentile_interval((counts @ sums) / (counts @ sizes))
    return Estimate(value, low, high, len(array), n_clusters)
