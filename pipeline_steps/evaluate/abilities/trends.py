"""Statistics of a sweep: rank correlation of each sound, Page's trend test, shuffled null, Holm's correction, size of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import page_trend_test, rankdata

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.evaluate.metrics.bootstrap import percentile_interval

ROUNDING = 1e-9
"""Differences of scores below which they are ties; rounding of a flat control must not become a trend."""

MIN_WAY = 0.1
"""Length of the way, in chords of the unit sphere, below which images do not move: rounding of pixels."""


@dataclass(frozen=True, slots=True)
class ShuffledNull:
    """Mean rank correlation when the points of each sound are in random order: its 95 % range, and the p-value."""

    low: float
    high: float
    p: float


def spearman_rows(scores: DoubleArray) -> DoubleArray:
    """Spearman's rank correlation [N] of the scores [N, P] of each sound with the order of the points; constant rows give 0."""
    return _correlation(_ranks(scores))


def page_p_value(scores: DoubleArray, direction: int) -> float:
    """P-value of Page's trend test (Page 1963) over N sounds and P points.

    The normal approximation is used. Ties get mean ranks, which makes it conservative.

    Args:
        scores: [N, P], N >= 2 and P >= 3.
        direction: 1: rising scores are predicted, -1: falling ones, 0: either, two-sided.
    """
    ranks = _ranks(scores)
    rising, falling = (
        float(page_trend_test(rows, ranked=True, method="asymptotic").pvalue) for rows in (ranks, ranks[:, ::-1])
    )
    return min(1.0, 2 * min(rising, falling)) if direction == 0 else rising if direction > 0 else falling


def shuffled_null(scores: DoubleArray, direction: int, num_resamples: int, seed: int) -> ShuffledNull:
    """Permutation null of the mean of `spearman_rows`: the points of each sound are shuffled independently."""
    rng, ranks = np.random.default_rng(seed), _ranks(scores)
    observed = float(_correlation(ranks).mean())
    means = np.array([_correlation(rng.permuted(ranks, axis=1)).mean() for _ in range(num_resamples)])
    low, high = percentile_interval(means)
    at_least = np.abs(means) >= abs(observed) - ROUNDING if direction == 0 else direction * (means - observed) >= -ROUNDING
    return ShuffledNull(low, high, float((1 + at_least.sum()) / (1 + num_resamples)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for the size of the family (Holm 1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda entry: (entry[1], entry[0]))):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return adjusted


def largest_step(features: DoubleArray) -> float:
    """Largest step as a fraction of the way that the images of one sound go along a sweep; NaN if none moves.

    1 / (P - 1) means even steps, 1 a single jump.

    Args:
        features: unit rows [P, S, K]; sample s has the same noise at every point.
    """
    steps = np.sqrt(np.maximum(2.0 - 2.0 * (features[1:] * features[:-1]).sum(-1), 0.0))
    way = steps.sum(0)
    moved = way > MIN_WAY
    return float((steps.max(0)[moved] / way[moved]).mean()) if moved.any() else float("nan")


def _ranks(scores: DoubleArray) -> DoubleArray:
    return np.asarray(rankdata(np.round(np.asarray(scores, np.float64) / ROUNDING), axis=1), np.float64)


def _correlation(ranks: DoubleArray) -> DoubleArray:
    """Pearson correlation [N] of ranks [N, P] with 0..P-1."""
    order = np.arange(ranks.shape[1]) - (ranks.shape[1] - 1) / 2
    centered = ranks - ranks.mean(1, keepdims=True)
    norm = np.sqrt((centered**2).sum(1) * (order**2).sum())
    return np.asarray(np.divide(centered @ order, norm, out=np.zeros(len(ranks)), where=norm > 0))
