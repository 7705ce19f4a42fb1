"""From scores to the table of neighbours: calibration, hub damping, order, and how much the damping helped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.core.statistics import gini, skewness
from pipeline_steps.retrieve.hubness import (
    calibrate,
    csls,
    csls_neighbourhood_mean,
    dynamic_inverted_softmax,
    item_log_normalisers,
    k_occurrence,
)
from pipeline_steps.retrieve.index.base import VectorIndex
from pipeline_steps.retrieve.index.exact import ExactIndex

Damping = Literal["none", "csls", "dis"]
REPORT_K = 10


@dataclass(frozen=True, slots=True)
class RankedNeighbours:
    """Neighbours of each text, best damped score first: rows, scores, z and damped scores, all [Q, k].

    `nearest` [Q, at most 10] are the rows before damping.
    """

    rows: IntArray
    scores: FloatArray
    z: FloatArray
    damped: FloatArray
    nearest: IntArray


def correct_hubness(
    method: Damping,
    k: int,
    beta: float,
    texts: FloatArray,
    sounds: FloatArray,
    rows: IntArray,
    scores: FloatArray,
    block: int,
    among_texts: VectorIndex | None = None,
) -> FloatArray:
    """Damped scores [Q, c] of candidates (rows and scores [Q, c], best first); `among_texts` finds the texts near a sound.

    CSLS is one-sided here: a sound's neighbourhood mean counts as the median at least. Tag affinities are never negative and
    mostly near zero, so plain CSLS would lift sounds that resemble nothing over those that fit (see docs/evaluation.md).
    """
    if method == "none" or not rows.size:
        return scores
    if method == "csls":
        found = (among_texts or ExactIndex(texts, block)).search(sounds, k)[1]
        item_means = csls_neighbourhood_mean(np.maximum(found, -1.0), k)  # -inf: an approximate search found fewer than k
        item_means = np.maximum(item_means, np.median(item_means))
        return csls(scores, csls_neighbourhood_mean(np.maximum(scores, -1.0), k), item_means[rows])
    normalisers = np.concatenate(
        [item_log_normalisers(texts @ sounds[start : start + block].T, beta) for start in range(0, len(sounds), block)]
    )
    hubs = np.zeros(len(sounds), np.bool_)
    nearest = rows[:, : max(1, min(k, rows.shape[1]))]
    hubs[nearest[nearest >= 0]] = True
    return dynamic_inverted_softmax(scores, normalisers[rows], hubs[rows[:, 0]], beta)


def rank_neighbours(
    search: VectorIndex,
    texts: FloatArray,
    sounds: FloatArray,
    k: int,
    method: Damping,
    damping_k: int,
    beta: float,
    null_sample: int,
    seed: int,
    block: int = 1024,
    among_texts: VectorIndex | None = None,
) -> RankedNeighbours:
    """The k best sounds [N, D] of each text [Q, D] after damping; candidates are the 2 k best by score.

    z compares a score with those of up to `null_sample` random sounds for the same text. `among_texts` searches the texts
    for CSLS; without it that is exact.
    """
    rows, scores = search.search(texts, min(2 * k, len(sounds)))
    damped = correct_hubness(method, damping_k, beta, texts, sounds, rows, scores, block, among_texts)
    count = min(null_sample, len(sounds))
    null_rows = np.sort(seeded_rng(seed, "retrieve", "null").permutation(len(sounds))[:count])
    null_sounds = sounds[null_rows]
    z = np.concatenate(
        [
            calibrate(scores[start : start + block], texts[start : start + block] @ null_sounds.T)
            for start in range(0, len(texts), block)
        ]
    )
    order = np.argsort(-damped, axis=1, kind="stable")[:, : min(k, len(sounds))]
    return RankedNeighbours(
        np.take_along_axis(rows, order, 1),
        np.take_along_axis(scores, order, 1),
        np.take_along_axis(z, order, 1),
        np.take_along_axis(damped, order, 1),
        rows[:, :REPORT_K],
    )


def hub_report(before: IntArray, after: IntArray, n_items: int) -> dict[str, dict[str, float]]:
    """k-occurrence skewness, Gini, share of items used and largest re-use among the 10 nearest, before and after damping."""
    report = {}
    for name, rows in (("before", before), ("after", after)):
        counts = k_occurrence(rows[:, :REPORT_K], n_items)
        report[name] = {
            "k_occurrence_skewness": round(skewness(counts), 4),
            "gini": round(gini(counts), 4),
            "used_share": round(float((counts > 0).mean()), 4),
            "max_occurrence": int(counts.max()),
        }
    return report
