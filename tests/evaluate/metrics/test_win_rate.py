"""Win rates compared with a direct count, without and with signal; coverage of the bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.evaluate.metrics.bootstrap import mean_estimate
from pipeline_steps.evaluate.metrics.win_rate import (
    derangement,
    mann_whitney_win_rate,
    negative_mask,
    win_rate_estimate,
    win_rates,
)

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=8)


@given(SCORES, SCORES)
def test_win_rate_equals_a_direct_count_and_ties_count_half(candidates: list[int], negatives: list[int]) -> None:
    expected = np.mean([(c > r) + 0.5 * (c == r) for c in candidates for r in negatives])
    assert mann_whitney_win_rate(np.array(candidates, float), np.array(negatives, float)) == pytest.approx(expected)


@given(SCORES, SCORES)
def test_win_rates_of_both_sides_add_up_to_one(left: list[int], right: list[int]) -> None:
    x, y = np.array(left, float), np.array(right, float)
    assert mann_whitney_win_rate(x, y) + mann_whitney_win_rate(y, x) == pytest.approx(1.0)


def test_win_rate_is_one_half_without_signal_and_higher_with_it() -> None:
    rng = np.random.default_rng(0)
    n, samples, dim = 60, 4, 24
    real = l2_normalize(rng.normal(size=(n, dim)))
    others = negative_mask([f"g{row}" for row in range(n)], [None] * n)
    groups = [f"g{row}" for row in range(n)]
    for strength, check in ((0.0, lambda low, high: low < 0.5 < high), (1.0, lambda low, high: low > 0.6)):
        generated = l2_normalize(strength * real[:, None] * 5 + rng.normal(size=(n, samples, dim)))
        scores = np.einsum("id,jsd->ijs", real, generated)
        rates = win_rates(scores[np.arange(n), np.arange(n)], scores, others)
        found = win_rate_estimate(rates, groups, 500, 1)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        assert check(found.low, found.high), found


def test_negatives_have_another_group_and_another_class() -> None:
    others = negative_mask(["g1", "g2"], ["", ""])
    assert others.tolist() == [[False, True], [True, False]], "an empty class is unknown"
    others = negative_mask(["g1", "g1", "g2", "g3"], ["dog", "dog", "dog", None])
    assert others.tolist() == [
        [False, False, False, True],
        [False, False, False, True],
        [False, False, False, True],
        [True, True, True, False],
    ]


def test_a_pair_without_negatives_or_candidates_has_no_rate() -> None:
    scores = np.zeros((2, 2, 3))
    rates = win_rates(np.array([[1.0, np.nan], [np.nan, np.nan]]), scores, np.array([[False, True], [True, False]]))
    assert rates[0] == 1.0
    assert np.isnan(rates[1])
    none = win_rates(np.ones((2, 1)), scores, np.zeros((2, 2), bool))
    assert win_rate_estimate(none, ["a", "b"], 10, 0) is None


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=14), st.integers(0, 99))
def test_derangement_never_keeps_group_or_class(classes: list[str], seed: int) -> None:
    others = negative_mask([f"g{row}" for row in range(len(classes))], classes)
    partner = derangement(others, seed)
    for item, other in enumerate(partner):
        assert (other == -1) == (not others[item].any())
        assert other == -1 or classes[item] != classes[other]
    largest = max(classes.count(name) for name in classes)
    if 2 * largest <= len(classes):  # Hall's condition for one-to-one
        assert sorted(partner) == list(range(len(classes)))
    assert np.array_equal(partner, derangement(others, seed))


def test_bootstrap_interval_covers_the_mean_at_its_level() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for repeat in range(120):
        cluster_effect = np.repeat(rng.normal(size=30), 3)
        values = 0.5 + cluster_effect + 0.3 * rng.normal(size=90)
        found = mean_estimate(values, [f"c{row // 3}" for row in range(90)], 300, repeat)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.5 <= found.high
    assert 0.86 <= covered / 120 <= 1.0  # nominal 0.95; about 0.75 without clusters


def test_one_cluster_gives_no_interval() -> None:
    found = mean_estimate([0.2, 0.4], ["same", "same"], 50, 0)
    assert (found.value, found.low, found.high) == (pytest.approx(0.3), None, None)
    with pytest.raises(ValueError, match="one cluster per value"):
        mean_estimate([], [], 50, 0)
