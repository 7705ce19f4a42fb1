"""Agreement as a win rate: does the picture drawn from this sound fit better than the pictures drawn from other sounds?

A raw cosine between two encoders has no scale: published values lie in 0.06-0.12 and even reverse the order of models. A
win rate has: 0.5 is chance whatever the judge, 1 is perfect, and both sides go through the same judge.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import BoolArray, DoubleArray
from pipeline_steps.evaluate.metrics.bootstrap import Estimate, mean_estimate


def mann_whitney_win_rate(candidates: DoubleArray, rivals: DoubleArray) -> float:
    """P[candidate > rival] + P[tie] / 2 over all pairs of scores [S] and [R]: the Mann-Whitney statistic, in 0..1."""
    ordered = np.sort(rivals)
    below = np.searchsorted(ordered, candidates, side="left")
    up_to = np.searchsorted(ordered, candidates, side="right")
    return float((below + up_to).sum() / (2.0 * len(candidates) * len(rivals)))


def negative_mask(groups: Sequence[str], classes: Sequence[str | None]) -> BoolArray:
    """Which sound may stand as "another sound" for which: [M, M], true where the group differs and the class does too.

    A class that is not known (None or empty) equals no other class: then the group alone decides.
    """
    group = np.asarray(groups, dtype=object)
    label = np.asarray([name or f"\0{row}" for row, name in enumerate(classes)], dtype=object)
    return np.asarray((group[:, None] != group[None, :]) & (label[:, None] != label[None, :]))


def item_win_rates(candidate_scores: DoubleArray, rival_scores: DoubleArray, others: BoolArray) -> DoubleArray:
    """One win rate per item, [N]; NaN where an item has no candidate or no other sound.

    Args:
        candidate_scores: [N, S] score of each of item i's candidate pictures against what item i asks for; NaN = none.
        rival_scores: [N, M, R] score of sound j's pictures against what item i asks for; NaN = none.
        others: [N, M], which sounds are rivals of item i.
    """
    rates = np.full(len(candidate_scores), np.nan)
    for item in range(len(candidate_scores)):
        candidates = candidate_scores[item][np.isfinite(candidate_scores[item])]
        rivals = rival_scores[item][others[item]].ravel()
        rivals = rivals[np.isfinite(rivals)]
        if len(candidates) and len(rivals):
            rates[item] = mann_whitney_win_rate(candidates, rivals)
    return rates


def win_rate_estimate(rates: DoubleArray, clusters: Sequence[str], repeats: int, seed: int) -> Estimate | None:
    """Mean of the items that have a rate, with a bootstrap interval over clusters of sounds; None when no item has one."""
    known = np.flatnonzero(np.isfinite(rates)).tolist()
    if not known:
        return None
    return mean_estimate(rates[known], [clusters[item] for item in known], repeats, seed)


def derangement(others: BoolArray, seed: int) -> npt.NDArray[np.int64]:
    """A random assignment of another item's sound to every item, [N], each sound used once where that is possible.

    Found as a linear assignment on random costs in which forbidden partners (same item, group or class) cost more than
    any number of allowed ones; only if no one-to-one assignment exists is a partner used twice; -1 if an item has none.
    """
    from scipy.optimize import linear_sum_assignment

    generator = np.random.default_rng(seed)
    n = len(others)
    cost = generator.random((n, n)) + np.where(others, 0.0, n + 1.0)
    _, partner = linear_sum_assignment(cost)
    partner = partner.astype(np.int64)
    for item in np.flatnonzero(~others[np.arange(n), partner]):
        allowed = np.flatnonzero(others[item])
        partner[item] = generator.choice(allowed) if len(allowed) else -1
    return np.asarray(partner)
