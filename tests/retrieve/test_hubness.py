"""Hubness correction and calibration, compared with plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.index.top_k import top_k
from pipeline_steps.retrieve.ranking import hubness_report, rank_neighbors

SIZES = st.tuples(st.integers(0, 2**31), st.integers(2, 9), st.integers(2, 9), st.integers(1, 6))


def unit(seed: int, rows: int, dimension: int = 5) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, dimension))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


@given(SIZES)
def test_csls_is_equation_7(sizes: tuple[int, int, int, int]) -> None:
    seed, n_queries, n_items, k = sizes
    queries, items = unit(seed, n_queries), unit(seed + 1, n_items)
    scores = queries @ items.T
    query_means = csls_neighborhood_mean(top_k(scores, k)[1], k)
    item_means = csls_neighborhood_mean(top_k(scores.T, k)[1], k)
    got = csls(scores, query_means, np.tile(item_means, (n_queries, 1)))
    for q in range(n_queries):
        for a in range(n_items):
            r_q = np.mean(sorted(scores[q], reverse=True)[:k])
            r_a = np.mean(sorted(scores[:, a], reverse=True)[:k])
            assert got[q, a] == pytest.approx(2 * scores[q, a] - r_q - r_a, abs=1e-5)


@given(SIZES, st.floats(0.5, 100))
def test_inverted_softmax_ranks_as_published(sizes: tuple[int, int, int, int], beta: float) -> None:
    seed, n_queries, n_items, _ = sizes
    scores = (unit(seed, n_queries) @ unit(seed + 1, n_items).T).astype(np.float64)
    normalisers = np.tile(item_log_normalizers(scores.astype(np.float32), beta), (n_queries, 1))
    active = np.arange(n_queries) % 2 == 0
    got = dynamic_inverted_softmax(scores.astype(np.float32), normalisers, active, beta)
    published = np.log(np.exp(beta * scores) / np.exp(beta * scores).sum(axis=0)) / beta
    for q in range(n_queries):
        wanted = published[q] if active[q] else scores[q]
        np.testing.assert_allclose(got[q] - got[q, 0], wanted - wanted[0], atol=1e-4)


def test_large_beta_does_not_overflow() -> None:
    assert np.isfinite(item_log_normalizers(np.ones((3, 2), np.float32), 1000.0)).all()


@given(st.lists(st.integers(0, 50), min_size=2, max_size=30))
def test_gini_is_the_mean_difference(counts: list[int]) -> None:
    values = np.array(counts, np.int64)
    got = gini(values)
    if values.sum():
        naive = np.abs(values[:, None] - values[None]).sum() / (2 * len(values) * values.sum())
        assert got == pytest.approx(naive, abs=1e-9)
    else:
        assert got == 0.0


def test_occurrence_and_skewness() -> None:
    counts = k_occurrence(np.array([[0, 1], [0, 2], [0, 1]]), 4)
    assert counts.tolist() == [3, 2, 1, 0]
    assert skewness(counts) == 0.0
    assert skewness(np.array([0, 0, 0, 9])) > 1
    assert skewness(np.array([2, 2, 2])) == 0.0


def test_calibration_is_a_z_score() -> None:
    null = np.array([[0.0, 2.0], [1.0, 1.0]], np.float32)
    np.testing.assert_allclose(calibrate(np.array([[3.0], [1.0]], np.float32), null), [[2.0], [0.0]])


@given(SIZES, st.sampled_from(["none", "csls", "dis"]))
def test_ranking_invariants(sizes: tuple[int, int, int, int], method: str) -> None:
    seed, n_texts, n_clips, k = sizes
    texts, clips = unit(seed, n_texts), unit(seed + 1, n_clips)
    correction = HubnessCorrectionConfig.model_validate({"method": method, "k": 3})
    ranked = rank_neighbors(ExactIndex(clips), texts, clips, k, correction, 100, 0)
    assert ranked.rows.shape == (n_texts, min(k, n_clips))
    assert (np.diff(ranked.corrected_score, axis=1) <= 0).all()
    assert all(len(set(row)) == len(row) for row in ranked.rows.tolist())
    np.testing.assert_allclose(np.take_along_axis(texts @ clips.T, ranked.rows, 1), ranked.score, atol=1e-5)
    if method == "none":
        np.testing.assert_array_equal(ranked.corrected_score, ranked.score)
    again = rank_neighbors(ExactIndex(clips), texts, clips, k, correction, 100, 0)
    assert again.corrected_score.tobytes() == ranked.corrected_score.tobytes()


def test_correction_reduces_a_planted_hub() -> None:
    random = np.random.default_rng(0)
    texts = unit(1, 60, 12)
    clips = unit(2, 40, 12)
    clips[7] = texts.mean(0) / np.linalg.norm(texts.mean(0))  # near every text
    texts = texts + 0.4 * clips[7] + 0.01 * random.normal(size=texts.shape)
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    before = ExactIndex(clips).search(texts, 10)[0]
    after = rank_neighbors(ExactIndex(clips), texts, clips, 10, HubnessCorrectionConfig(k=10), 100, 0).rows
    report = hubness_report(before, after, len(clips))
    assert report["corrected"]["max_k_occurrence"] < report["raw"]["max_k_occurrence"]
    assert report["corrected"]["gini"] < report["raw"]["gini"]
    assert report["corrected"]["k_occurrence_skewness"] < report["raw"]["k_occurrence_skewness"]
