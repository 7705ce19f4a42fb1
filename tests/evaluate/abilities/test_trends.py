"""Trend statistics compared with scipy and with known values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import page_trend_test, spearmanr

from pipeline_steps.evaluate.abilities.trends import holm, largest_step, page_p_value, shuffled_null, spearman_rows

RISING = np.arange(9.0) + 100 * np.arange(6)[:, None]


@given(arrays(np.float64, (4, 7), elements=st.integers(-5, 5).map(float)))
def test_rank_correlation_equals_that_of_scipy(scores: np.ndarray) -> None:
    for row, rho in zip(scores, spearman_rows(scores), strict=True):
        expected = spearmanr(np.arange(7), row).statistic if np.ptp(row) else 0.0
        assert rho == pytest.approx(expected, abs=1e-9)


def test_page_test_equals_that_of_scipy_and_is_one_sided() -> None:
    scores = RISING + np.random.default_rng(0).normal(0, 4, RISING.shape)
    expected = page_trend_test(scores, method="asymptotic").pvalue
    assert page_p_value(scores, 1) == pytest.approx(expected)
    assert page_p_value(scores, -1) == pytest.approx(1 - expected, abs=0.02)
    assert page_p_value(scores, 0) == pytest.approx(2 * expected)
    assert page_p_value(np.ones((6, 9)), 1) == pytest.approx(0.5)
    assert page_p_value(1 + 1e-13 * RISING, 1) == pytest.approx(0.5), "rounding is no trend"


def test_shuffled_null_contains_unordered_scores_and_excludes_rising_ones() -> None:
    null = shuffled_null(RISING, 1, 999, 0)
    assert null.p == pytest.approx(0.001)
    assert -0.4 < null.low < 0 < null.high < 0.4
    assert shuffled_null(-RISING, 1, 999, 0).p == 1.0
    assert shuffled_null(-RISING, 0, 999, 0).p == pytest.approx(0.001)
    random = np.random.default_rng(1).normal(size=(200, 6, 9))
    small = [shuffled_null(scores, 1, 99, 0).p <= 0.05 for scores in random]
    assert 0.01 < np.mean(small) < 0.11, "the level of the test is kept"


def test_holm_correction_equals_the_step_down_of_the_paper() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_largest_step_is_higher_for_a_jump_than_for_even_steps() -> None:
    angles = np.linspace(0, 1, 9)
    even = np.stack([np.cos(angles), np.sin(angles)], -1)[:, None].repeat(2, 1)
    assert largest_step(even) == pytest.approx(1 / 8)
    jump = np.where(np.arange(9) < 5, 0.0, 1.0)
    assert largest_step(np.stack([np.cos(jump), np.sin(jump)], -1)[:, None]) == pytest.approx(1.0)
    assert np.isnan(largest_step(np.ones((9, 2, 1))))
