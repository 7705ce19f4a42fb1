"""Tests of the paired bootstrap: coverage of intervals, calibration of p-values, symmetry."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline_steps.tracking.registry.paired_bootstrap import difference_from_bootstrap, paired_difference, two_sided_p

NUMBERS = st.floats(-1.0, 1.0, allow_nan=False)


def test_interval_agrees_with_the_t_interval_of_independent_pairs() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    b = a + rng.normal(0.1, 0.3, size=200)
    found = paired_difference(a, b, [f"c{i}" for i in range(200)], 4000, 0)
    theory = stats.t.interval(0.95, 199, loc=np.mean(b - a), scale=stats.sem(b - a))
    assert found.value == pytest.approx(float(np.mean(b - a)))
    assert found.low == pytest.approx(theory[0], abs=0.006)
    assert found.high == pytest.approx(theory[1], abs=0.006)
    assert found.p is not None
    assert found.p == pytest.approx(stats.ttest_rel(b, a).pvalue, abs=0.01)


def test_pairing_narrows_the_interval() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(size=60)
    b = a + 0.1 + rng.normal(0, 0.05, size=60)
    names = [f"c{i}" for i in range(60)]
    paired = paired_difference(a, b, names, 1000, 0)
    broken = paired_difference(a, rng.permutation(b), names, 1000, 0)
    assert paired.low is not None
    assert paired.low > 0
    assert broken.low is not None
    assert broken.low < 0


def test_items_of_one_clip_are_one_cluster() -> None:
    rng = np.random.default_rng(2)
    gaps = np.repeat(rng.normal(0, 1, size=12), 20)
    alone = paired_difference(np.zeros(240), gaps, [f"c{i}" for i in range(240)], 1000, 0)
    clustered = paired_difference(np.zeros(240), gaps, [f"c{i // 20}" for i in range(240)], 1000, 0)
    assert (clustered.n, clustered.clusters) == (240, 12)
    assert alone.high is not None
    assert alone.low is not None
    assert clustered.high is not None
    assert clustered.low is not None
    assert clustered.high - clustered.low > 3 * (alone.high - alone.low)


def test_p_values_are_calibrated() -> None:
    """Without a difference, p is below 0.05 in about 5 % of the data sets."""
    rng = np.random.default_rng(3)
    names = [f"c{i}" for i in range(40)]
    rejections = 0
    for seed in range(300):
        gap = rng.normal(size=40)
        found = paired_difference(np.zeros(40), gap, names, 400, seed)
        assert found.p is not None
        rejections += found.p < 0.05
    assert 4 <= rejections <= 30


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=30), st.integers(0, 99))
def test_swapping_the_models_negates_the_difference(pairs: list[tuple[float, float]], seed: int) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    names = [f"c{i // 2}" for i in range(len(pairs))]
    forward, backward = paired_difference(a, b, names, 100, seed), paired_difference(b, a, names, 100, seed)
    assert forward.value == pytest.approx(-backward.value)
    assert forward.p == backward.p
    if forward.low is not None and backward.high is not None:
        assert forward.low == pytest.approx(-backward.high)


@given(st.lists(NUMBERS, min_size=2, max_size=40))
def test_p_is_a_probability_and_one_for_equal_models(replicates: list[float]) -> None:
    assert 0 < two_sided_p(np.array(replicates)) <= 1
    assert two_sided_p(np.zeros(len(replicates))) == 1.0


def test_missing_values_are_dropped_and_one_cluster_has_no_interval() -> None:
    found = paired_difference([0.1, float("nan"), 0.3], [0.2, 0.5, float("nan")], ["x", "y", "z"], 100, 0)
    assert (found.n, found.clusters, found.low, found.p) == (1, 1, None, None)
    assert difference_from_bootstrap(0.5, np.array([np.nan, np.nan]), 3, 3).low is None
    with pytest.raises(ValueError, match="both sides"):
        paired_difference([float("nan")], [1.0], ["x"], 100, 0)
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference([1.0, 2.0], [1.0], ["x"], 100, 0)
