"""Retrieval metrics with intervals: ranks, R@k, mean reciprocal rank, median rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.evaluate.metrics.bootstrap import (
    Estimate,
    cluster_index,
    mean_estimate,
    percentile_interval,
    resample_counts,
)

RECALL_AT = (1, 5, 10)


def ranks(scores: npt.ArrayLike, targets: Sequence[int]) -> DoubleArray:
    """Rank [Q] of the true candidate of each query; 1 is best. Ties count half, so a constant score ranks in the middle.

    Args:
        scores: [Q, C], higher is better; a row of NaN (a query without a score) ranks as chance would.
        targets: column of the true candidate of each query.
    """
    matrix = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=0.0)
    own = matrix[np.arange(len(targets)), np.asarray(targets)][:, None]
    return np.asarray(1.0 + (matrix > own).sum(1) + ((matrix == own).sum(1) - 1) / 2.0)


def score_by_events(similarity: npt.ArrayLike, weights: npt.ArrayLike) -> DoubleArray:
    """Score [C] of every candidate for one image: the weighted mean of the similarities of its events.

    Args:
        similarity: [E, C] of the events to the candidates.
        weights: [E] of the events; they are normalized here.
    """
    weight = np.asarray(weights, dtype=np.float64)
    total = weight.sum()
    weight = weight / total if total > 0 else np.full(len(weight), 1.0 / len(weight))
    return np.asarray(weight @ np.asarray(similarity, dtype=np.float64))


def summary(rank: DoubleArray, clusters: Sequence[str], num_bootstrap: int, seed: int) -> dict[str, Estimate]:
    """R@1, R@5, R@10, MRR (mean of 1 / rank) and median rank of `rank` [Q], with cluster-bootstrap intervals."""
    found = {f"recall_at_{k}": mean_estimate((rank <= k).astype(np.float64), clusters, num_bootstrap, seed) for k in RECALL_AT}
    found["mrr"] = mean_estimate(1.0 / rank, clusters, num_bootstrap, seed)
    found["median_rank"] = _median_estimate(rank, clusters, num_bootstrap, seed)
    return found


def random_summary(candidates: int, queries: int) -> dict[str, Estimate]:
    """Expected values of a random ranking of `candidates`; they are exact and have no interval."""
    harmonic = float((1.0 / np.arange(1, candidates + 1)).sum())
    values = {f"recall_at_{k}": min(k, candidates) / candidates for k in RECALL_AT}
    values |= {"mrr": harmonic / candidates, "median_rank": (candidates + 1) / 2}
    return {name: Estimate(value, None, None, queries, queries) for name, value in values.items()}


def _median_estimate(rank: DoubleArray, clusters: Sequence[str], num_bootstrap: int, seed: int) -> Estimate:
    index, n_clusters = cluster_index(clusters)
    value = float(np.median(rank))
    if n_clusters < 2:
        return Estimate(value, None, None, len(rank), n_clusters)
    counts = resample_counts(n_clusters, num_bootstrap, np.random.default_rng(seed))[:, index]
    low, high = percentile_interval(np.array([np.median(np.repeat(rank, row)) for row in counts]))
    return Estimate(value, low, high, len(rank), n_clusters)
