"""Win rate: how often an image generated from a clip fits better than images generated from other clips.

Raw cosines between two encoders have no scale: published values lie in 0.06-0.12 and reverse the order of models. A win rate
of 0.5 is chance with every judge, and 1 is perfect.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline_steps.core.array_types import BoolArray, DoubleArray, IntArray
from pipeline_steps.evaluate.metrics.bootstrap import Estimate, mean_estimate


def mann_whitney_win_rate(candidates: DoubleArray, negatives: DoubleArray) -> float:
    """P[candidate > negative] + P[tie] / 2 over all pairs of scores [S] and [R]: the Mann-Whitney statistic, in 0..1."""
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, candidates, side="left")
    up_to = np.searchsorted(ordered, candidates, side="right")
    return float((below + up_to).sum() / (2.0 * len(candidates) * len(negatives)))


def negative_mask(groups: Sequence[str], classes: Sequence[str | None]) -> BoolArray:
    """Negative clips of each clip [M, M]: true where both the group and the class differ.

    An unknown class (None or empty) differs from every class, so that the group alone decides.
    """
    group = np.asarray(groups, dtype=object)
    label = np.asarray([name or f"\0{row}" for row, name in enumerate(classes)], dtype=object)
    return np.asarray((group[:, None] != group[None, :]) & (label[:, None] != label[None, :]))


def win_rates(candidate_scores: DoubleArray, negative_scores: DoubleArray, negatives: BoolArray) -> DoubleArray:
    """Win rate of each pair [N]; NaN if a pair has no candidate or no negative clip.

    Args:
        candidate_scores: [N, S] similarity of the candidates of pair i to its target; NaN: no candidate.
        negative_scores: [N, M, R] similarity of the images of clip j to the target of pair i; NaN: no image.
        negatives: [N, M] negative clips of each pair.
    """
    rates = np.full(len(candidate_scores), np.nan)
    for pair, scores in enumerate(candidate_scores):
        candidates = scores[np.isfinite(scores)]
        others = negative_scores[pair][negatives[pair]].ravel()
        others = others[np.isfinite(others)]
        if len(candidates) and len(others):
            rates[pair] = mann_whitney_win_rate(candidates, others)
    return rates


def win_rate_estimate(rates: DoubleArray, clusters: Sequence[str], num_bootstrap: int, seed: int) -> Estimate | None:
    """Mean of the finite rates with a cluster-bootstrap interval; None if all are NaN."""
    finite = np.flatnonzero(np.isfinite(rates)).tolist()
    if not finite:
        return None
    return mean_estimate(rates[finite], [clusters[pair] for pair in finite], num_bootstrap, seed)


def derangement(allowed: BoolArray, seed: int) -> IntArray:
    """Random assignment [N] of another item to every item, one to one where that is possible.

    A linear assignment on random costs, in which a forbidden partner costs more than any number of allowed ones. If no
    one-to-one assignment exists, partners are used twice. -1 marks items without an allowed partner.

    Args:
        allowed: [N, N] partners that each item may have.
        seed: of the random costs.
    """
    from scipy.optimize import linear_sum_assignment

    generator = np.random.default_rng(seed)
    n = len(allowed)
    cost = generator.random((n, n)) + np.where(allowed, 0.0, n + 1.0)
    _, partner = linear_sum_assignment(cost)
    partner = partner.astype(np.int64)
    for item in np.flatnonzero(~allowed[np.arange(n), partner]):
        choices = np.flatnonzero(allowed[item])
        partner[item] = generator.choice(choices) if len(choices) else -1
    return np.asarray(partner)
