"""Hubness: some sounds are near to many texts. Measures of it, and two ways to damp it."""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import BoolArray, FloatArray, IntArray


def k_occurrence(neighbours: IntArray, n_items: int) -> IntArray:
    """How often each of n_items occurs among the neighbours [Q, k] (Radovanovic et al. 2010, N_k); row -1 is nobody."""
    return np.bincount(neighbours[neighbours >= 0], minlength=n_items).astype(np.int64)


def csls_neighbourhood_mean(best_scores: FloatArray, k: int) -> FloatArray:
    """Mean of the first k of scores sorted best first [N, >=1] -> [N]: the r of CSLS."""
    return np.asarray(best_scores[:, : max(1, k)].mean(axis=1, dtype=np.float64), np.float32)


def csls(scores: FloatArray, query_means: FloatArray, item_means: FloatArray) -> FloatArray:
    """Cross-domain similarity local scaling (Conneau et al. 2018, eq. 7): 2 s(q, a) - r(q) - r(a).

    Args:
        scores: [Q, k] of candidates.
        query_means: r(q) [Q], mean score of a query's nearest items.
        item_means: r(a) [Q, k], mean score of each candidate's nearest queries.
    """
    return np.asarray(2.0 * scores - query_means[:, None] - item_means, np.float32)


def item_log_normalisers(scores: FloatArray, beta: float) -> FloatArray:
    """log sum over queries of exp(beta s(q, a)) for scores [Q, N] -> [N], computed without overflow."""
    scaled = beta * scores.astype(np.float64)
    peak = scaled.max(axis=0)
    return np.asarray(peak + np.log(np.exp(scaled - peak).sum(axis=0)), np.float32)


def dynamic_inverted_softmax(scores: FloatArray, log_normalisers: FloatArray, active: BoolArray, beta: float) -> FloatArray:
    """Dynamic inverted softmax (Bogolin et al. 2022, QB-Norm): normalise only where a query's nearest item is a hub.

    The published form exp(beta s) / (sum over the query bank of exp(beta s)) is used here as its logarithm over beta, shifted
    by the mean normaliser: it ranks alike and stays on the scale of the scores.

    Args:
        scores: [Q, k] of candidates.
        log_normalisers: [Q, k] of the candidates, from `item_log_normalisers`.
        active: [Q], whether the query's nearest item is among the nearest items of the query bank.
        beta: inverse temperature.
    """
    centre = float(log_normalisers.mean()) if log_normalisers.size else 0.0
    return np.asarray(np.where(active[:, None], scores - (log_normalisers - centre) / beta, scores), np.float32)


def calibrate(scores: FloatArray, null_scores: FloatArray) -> FloatArray:
    """z of scores [Q, k]: (score - mean) / std over random sounds' scores [Q, M] of the same text (1e-6 at least)."""
    mean = null_scores.mean(axis=1, dtype=np.float64)[:, None]
    std = np.maximum(null_scores.std(axis=1, dtype=np.float64)[:, None], 1e-6)
    return np.asarray((scores - mean) / std, np.float32)
