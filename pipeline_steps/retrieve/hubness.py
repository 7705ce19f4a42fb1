"""Hubness, the tendency of some clips to be near many texts: its measure and two corrections of scores."""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import BoolArray, FloatArray, IntArray


def k_occurrence(neighbors: IntArray, n_items: int) -> IntArray:
    """Occurrences [n_items] of each item among the neighbors [Q, k] (Radovanovic et al. 2010, N_k); row -1 is no item."""
    return np.bincount(neighbors[neighbors >= 0], minlength=n_items).astype(np.int64)


def csls_neighborhood_mean(best_scores: FloatArray, k: int) -> FloatArray:
    """Mean [N] of the first k scores [N, >=1], sorted best first: the r of CSLS."""
    return np.asarray(best_scores[:, : max(1, k)].mean(axis=1, dtype=np.float64), np.float32)


def csls(scores: FloatArray, query_means: FloatArray, item_means: FloatArray) -> FloatArray:
    """Cross-domain similarity local scaling (Conneau et al. 2018, eq. 7): 2 s(q, a) - r(q) - r(a).

    Args:
        scores: [Q, k] of candidates.
        query_means: r(q) [Q], mean score of a query's nearest items.
        item_means: r(a) [Q, k], mean score of each candidate's nearest queries.
    """
    return np.asarray(2.0 * scores - query_means[:, None] - item_means, np.float32)


def item_log_normalizers(scores: FloatArray, beta: float) -> FloatArray:
    """Log of the sum over queries of exp(beta s(q, a)) [N] for scores [Q, N], computed without overflow."""
    scaled = beta * scores.astype(np.float64)
    peak = scaled.max(axis=0)
    return np.asarray(peak + np.log(np.exp(scaled - peak).sum(axis=0)), np.float32)


def dynamic_inverted_softmax(scores: FloatArray, log_normalizers: FloatArray, active: BoolArray, beta: float) -> FloatArray:
    """Dynamic inverted softmax (Bogolin et al. 2022, QB-Norm): normalize only where a query's nearest item is a hub.

    The published form exp(beta s) / (sum over the query bank of exp(beta s)) is replaced by its logarithm over beta, shifted
    by the mean normalizer. The order is the same, and the values stay on the scale of the scores.

    Args:
        scores: [Q, k] of candidates.
        log_normalizers: [Q, k] of the candidates, from `item_log_normalizers`.
        active: [Q], whether the query's nearest item is among the nearest items of the query bank.
        beta: inverse temperature.
    """
    centre = float(log_normalizers.mean()) if log_normalizers.size else 0.0
    return np.asarray(np.where(active[:, None], scores - (log_normalizers - centre) / beta, scores), np.float32)


def calibrate(scores: FloatArray, null_scores: FloatArray) -> FloatArray:
    """z-scores of scores [Q, k]: mean and standard deviation (at least 1e-6) of random clips' scores [Q, M] for the text."""
    mean = null_scores.mean(axis=1, dtype=np.float64)[:, None]
    std = np.maximum(null_scores.std(axis=1, dtype=np.float64)[:, None], 1e-6)
    return np.asarray((scores - mean) / std, np.float32)
