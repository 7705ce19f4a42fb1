"""Picture -> sound retrieval on pairs whose truth is known: ranks, R@k, MRR, median rank, with intervals."""

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
    """Rank (1 is best) of each query's true candidate, [Q]; ties count half, so a constant score ranks in the middle.

    Args:
        scores: [Q, C], higher is better; a row of NaN (the query abstained: no event, no score) ranks as chance would.
        targets: column of the true candidate of each query.
    """
    matrix = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=0.0)
    own = matrix[np.arange(len(targets)), np.asarray(targets)][:, None]
    return np.asarray(1.0 + (matrix > own).sum(1) + ((matrix == own).sum(1) - 1) / 2.0)


def score_by_events(similarity: npt.ArrayLike, weights: npt.ArrayLike) -> DoubleArray:
    """Score of every sound for one picture, [C], from its events: the weighted mean of their similarities.

    Args:
        similarity: [E, C] of the picture's events to the candidates.
        weights: [E], how much each event counts; normalised here.
    """
    weight = np.asarray(weights, dtype=np.float64)
    total = weight.sum()
    weight = weight / total if total > 0 else np.full(len(weight), 1.0 / len(weight))
    return np.asarray(weight @ np.asarray(similarity, dtype=np.float64))


def summary(rank: DoubleArray, clusters: Sequence[str], repeats: int, seed: int) -> dict[str, Estimate]:
    """R@1, R@5, R@10, MRR (mean of 1/rank) and median rank of `rank` [Q], each with a cluster-bootstrap interval."""
    found = {f"recall_at_{k}": mean_estimate((rank <= k).astype(np.float64), clusters, repeats, seed) for k in RECALL_AT}
    found["mrr"] = mean_estimate(1.0 / rank, clusters, repeats, seed)
    found["median_rank"] = _median_estimate(rank, clusters, repeats, seed)
    return found


def random_summary(candidates: int, queries: int) -> dict[str, Estimate]:
    """The same numbers in expectation for a ranking drawn at random among `candidates`: exact, so without an interval."""
    harmonic = float((1.0 / np.arange(1, candidates + 1)).sum())
    values = {f"recall_at_{k}": min(k, candidates) / candidates for k in RECALL_AT}
    values |= {"mrr": harmonic / candidates, "median_rank": (candidates + 1) / 2}
    return {name: Estimate(value, None, None, queries, queries) for name, value in values.items()}


def _median_estimate(rank: DoubleArray, clusters: Sequence[str], repeats: int, seed: int) -> Estimate:
    index, n_clusters = cluster_index(clusters)
    value = float(np.median(rank))
    if n_clusters < 2:
        return Estimate(value, None, None, len(rank), n_clusters)
    counts = resample_counts(n_clusters, repeats, np.random.default_rng(seed))[:, index]
    draws = np.array([np.median(np.repeat(rank, row)) for row in counts])
    low, high = percentile_interval(draws)
    return Estimate(value, low, high, len(rank), n_clusters)
