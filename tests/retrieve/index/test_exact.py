"""Exact search, compared with brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline_steps.retrieve.index.base import recall_at
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.index.top_k import top_k

SCORES = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=st.sampled_from([-1, 0, 0.25, 0.5, 1])
)


@given(SCORES, st.integers(1, 15))
def test_top_k_is_the_sorted_order_with_ties_to_the_smaller_column(scores: np.ndarray, k: int) -> None:
    columns, values = top_k(scores, k)
    for row, found, value in zip(scores, columns, values, strict=True):
        wanted = sorted(range(len(row)), key=lambda column: (-row[column], column))[:k]
        assert found.tolist() == wanted
        assert value.tolist() == [row[column] for column in wanted]


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 30), st.integers(1, 60), st.integers(1, 7))
def test_the_batch_size_does_not_change_results(seed: int, queries: int, items: int, k: int, block: int) -> None:
    random = np.random.default_rng(seed)
    asked = random.normal(size=(queries, 8)).astype(np.float32)
    held = random.normal(size=(items, 8)).astype(np.float32)
    rows, scores = ExactIndex(held, block).search(asked, k)
    truth = asked.astype(np.float64) @ held.T.astype(np.float64)
    assert rows.shape == scores.shape == (queries, min(k, items)), "k > n returns n"
    np.testing.assert_allclose(np.take_along_axis(truth, rows, 1), scores, atol=1e-4)
    np.testing.assert_allclose(np.sort(truth, axis=1)[:, ::-1][:, : min(k, items)], scores, atol=1e-4)


def test_no_query_returns_no_row() -> None:
    rows, scores = ExactIndex(np.eye(3, dtype=np.float32)).search(np.zeros((0, 3), np.float32), 2)
    assert rows.shape == scores.shape == (0, 2)


def test_recall_counts_sets_not_orders() -> None:
    exact = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert recall_at(np.array([[1, 0, 9, 9], [4, 9, 5, 9]]), exact, 2) == pytest.approx(0.75)
    assert recall_at(exact, exact, 10) == 1.0
