"""Ranking of retrieved audio: calibration, hubness correction, order, and hubness before and after."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.core.statistics import gini, skewness
from pipeline_steps.retrieve.config import HubnessCorrectionConfig
from pipeline_steps.retrieve.hubness import (
    calibrate,
    csls,
    csls_neighborhood_mean,
    dynamic_inverted_softmax,
    item_log_normalizers,
    k_occurrence,
)
from pipeline_steps.retrieve.index.base import VectorIndex
from pipeline_steps.retrieve.index.exact import ExactIndex

REPORT_K = 10


@dataclass(frozen=True, slots=True)
class RankedNeighbors:
    """Neighbors of each text, best corrected score first."""

    rows: IntArray  # [Q, k], like the three scores; -1 for a neighbor that the index did not find
    score: FloatArray
    z_score: FloatArray
    corrected_score: FloatArray
    nearest: IntArray  # [Q, at most 10], the rows before hubness correction


def correct_hubness(
    correction: HubnessCorrectionConfig,
    texts: FloatArray,
    audio: FloatArray,
    rows: IntArray,
    scores: FloatArray,
    query_batch_size: int,
    text_index: VectorIndex | None = None,
) -> FloatArray:
    """Corrected scores [Q, c] of candidates (rows and scores [Q, c], best first).

    CSLS is one-sided here: the neighborhood mean of a clip is at least the median over clips. Tag affinities are never negative
    and mostly near zero, so plain CSLS would raise clips that resemble nothing above those that match
    (docs/explanation/hubness.md).

    Args:
        text_index: index of the texts for CSLS; None: exact search.
    """
    if correction.method == "none" or not rows.size:
        return scores
    k, beta = correction.k, correction.beta
    if correction.method == "csls":
        found = (text_index or ExactIndex(texts, query_batch_size)).search(audio, k)[1]
        item_means = csls_neighborhood_mean(np.maximum(found, -1.0), k)  # -inf: an approximate index found fewer than k
        item_means = np.maximum(item_means, np.median(item_means))
        return csls(scores, csls_neighborhood_mean(np.maximum(scores, -1.0), k), item_means[rows])
    normalizers = np.concatenate(
        [
            item_log_normalizers(texts @ audio[start : start + query_batch_size].T, beta)
            for start in range(0, len(audio), query_batch_size)
        ]
    )
    hubs = np.zeros(len(audio), np.bool_)
    nearest = rows[:, : max(1, min(k, rows.shape[1]))]
    hubs[nearest[nearest >= 0]] = True
    return dynamic_inverted_softmax(scores, normalizers[rows], hubs[rows[:, 0]], beta)


def rank_neighbors(
    index: VectorIndex,
    texts: FloatArray,
    audio: FloatArray,
    k: int,
    correction: HubnessCorrectionConfig,
    null_sample_size: int,
    seed: int,
    query_batch_size: int = 1024,
    text_index: VectorIndex | None = None,
) -> RankedNeighbors:
    """The k best clips [N, D] of each text [Q, D] after hubness correction of the 2 k best by score.

    Args:
        null_sample_size: largest number of random clips whose scores for the same text calibrate the z-scores.
        text_index: index of the texts for CSLS; None: exact search.
    """
    rows, scores = index.search(texts, min(2 * k, len(audio)))
    corrected = correct_hubness(correction, texts, audio, rows, scores, query_batch_size, text_index)
    count = min(null_sample_size, len(audio))
    null_audio = audio[np.sort(seeded_rng(seed, "retrieve", "null").permutation(len(audio))[:count])]
    z_score = np.concatenate(
        [
            calibrate(scores[start : start + query_batch_size], texts[start : start + query_batch_size] @ null_audio.T)
            for start in range(0, len(texts), query_batch_size)
        ]
    )
    order = np.argsort(-corrected, axis=1, kind="stable")[:, : min(k, len(audio))]
    return RankedNeighbors(
        np.take_along_axis(rows, order, 1),
        np.take_along_axis(scores, order, 1),
        np.take_along_axis(z_score, order, 1),
        np.take_along_axis(corrected, order, 1),
        rows[:, :REPORT_K],
    )


def hubness_report(raw: IntArray, corrected: IntArray, n_items: int) -> dict[str, dict[str, float]]:
    """Hubness of the 10 nearest rows [Q, >=10], before and after correction.

    Returns:
        k-occurrence skewness, Gini coefficient, fraction of items used, and largest k-occurrence, by `raw` and `corrected`.
    """
    report = {}
    for name, rows in (("raw", raw), ("corrected", corrected)):
        counts = k_occurrence(rows[:, :REPORT_K], n_items)
        report[name] = {
            "k_occurrence_skewness": round(skewness(counts), 4),
            "gini": round(gini(counts), 4),
            "coverage": round(float((counts > 0).mean()), 4),
            "max_k_occurrence": int(counts.max()),
        }
    return report
