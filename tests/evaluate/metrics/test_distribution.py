"""Distances compared with double loops and closed forms, and a mode-collapsed set that reveals swapped arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from pipeline_steps.evaluate.metrics.distribution import (
    density_coverage_bootstrap,
    frechet_distance,
    kid_kernel,
    median_bandwidth,
    mmd_bootstrap,
    mmd_squared,
    rbf_kernel,
    squared_distances,
)


def each_alone(prefix: str, n: int) -> list[str]:
    return [f"{prefix}{row}" for row in range(n)]


def density_and_coverage(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    clusters = each_alone("x", len(generated)), each_alone("y", len(real))
    (density, _), (coverage, _) = density_coverage_bootstrap(generated, real, k, *clusters, 2, 0)
    return density.value, coverage.value


def naive_mmd(x: np.ndarray, y: np.ndarray, kernel, cx: list[str], cy: list[str]) -> float:
    """Equation 3 of Gretton et al. with two loops, leaving out pairs inside a cluster."""

    def within(rows: np.ndarray, clusters: list[str]) -> float:
        values = [
            kernel(rows[i : i + 1], rows[j : j + 1])[0, 0]
            for i in range(len(rows))
            for j in range(len(rows))
            if clusters[i] != clusters[j]
        ]
        return float(np.mean(values))

    between = float(np.mean([kernel(a[None], b[None])[0, 0] for a in x for b in y]))
    return within(x, cx) + within(y, cy) - 2 * between


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(1, 4), st.integers(0, 10_000), st.booleans())
def test_mmd_equals_the_double_loop(n: int, m: int, dim: int, seed: int, clustered: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, dim)), rng.normal(size=(m, dim)) + 0.3
    cx = [f"s{row // 2}" for row in range(n)] if clustered and n > 2 else each_alone("x", n)
    cy = each_alone("y", m)
    for kernel in (kid_kernel, rbf_kernel(1.7)):
        assert mmd_squared(x, y, kernel, cx, cy) == pytest.approx(naive_mmd(x, y, kernel, cx, cy), rel=1e-9, abs=1e-12)


def test_mmd_is_unbiased_for_clustered_samples() -> None:
    """Four nearly equal samples per clip: the estimator without clusters is biased, the one with clusters is not."""
    rng = np.random.default_rng(3)
    clustered, plain = [], []
    for _ in range(60):
        x = np.repeat(rng.normal(size=(12, 6)), 4, axis=0) + 0.01 * rng.normal(size=(48, 6))
        y = rng.normal(size=(30, 6))
        sounds = [f"s{row // 4}" for row in range(48)]
        clustered.append(mmd_squared(x, y, kid_kernel, sounds, each_alone("y", 30)))
        plain.append(mmd_squared(x, y, kid_kernel, each_alone("x", 48), each_alone("y", 30)))
    assert abs(np.mean(clustered)) < 3 * np.std(clustered) / np.sqrt(60)
    assert np.mean(plain) > 3 * np.std(plain) / np.sqrt(60)


def test_mmd_interval_covers_the_truth_and_excludes_zero_for_different_sets() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for repeat in range(40):
        x, y = rng.normal(size=(40, 4)), rng.normal(size=(40, 4))
        found, _ = mmd_bootstrap(x, y, rbf_kernel(2.0), each_alone("x", 40), each_alone("y", 40), 300, repeat)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.0 <= found.high
    assert covered >= 32  # nominal 38 of 40
    far, _ = mmd_bootstrap(
        rng.normal(size=(40, 4)) + 1, y, rbf_kernel(2.0), each_alone("x", 40), each_alone("y", 40), 300, 0, 1000.0
    )
    assert far.low is not None
    assert far.low > 0
    assert far.value > 100
    assert (far.n, far.clusters) == (40, 40)


def test_distances_reject_sets_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="two or more clusters"):
        mmd_squared(np.ones((4, 2)), np.ones((3, 2)), kid_kernel, ["a"] * 4, ["x", "y", "z"])
    with pytest.raises(ValueError, match="two or more rows"):
        frechet_distance(np.ones((1, 2)), np.ones((3, 2)))


def test_too_few_clusters_give_no_interval() -> None:
    """With one cluster (density, coverage) or two (MMD), every resample has the same value."""
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(9, 3))
    for cx, cy, known in (("aaaabbbb", "ccddddeee", False), ("aaabbbcc", "ddddddeee", False), ("aaabbbcc", "dddeeefff", True)):
        found, values = mmd_bootstrap(x, y, kid_kernel, list(cx), list(cy), 200, 0)
        assert (found.low is not None, found.high is not None) == (known, known)
        assert len(values) == 200
    for cx, cy in (("a" * 8, "ccccddddd"), ("aaaabbbb", "c" * 9)):
        (density, _), (coverage, _) = density_coverage_bootstrap(x, y, 3, list(cx), list(cy), 200, 0)
        assert (density.low is None) == (len(set(cx)) == 1)
        assert (coverage.low is None) == (len(set(cy)) == 1)


def test_coverage_counts_real_images_and_density_generated_ones() -> None:
    rng = np.random.default_rng(7)
    found = density_coverage_bootstrap(
        rng.normal(size=(8, 3)), rng.normal(size=(9, 3)), 3, list("aabbccdd"), list("efghijklm"), 50, 0
    )
    assert [(estimate.n, estimate.clusters) for estimate, _ in found] == [(8, 4), (9, 9)]


@pytest.mark.parametrize(("n", "m", "dim"), [(20, 30, 50), (200, 150, 12), (9, 200, 40)])
def test_frechet_equals_the_matrix_square_root(n: int, m: int, dim: int) -> None:
    rng = np.random.default_rng(n)
    mix = rng.normal(size=(dim, dim))
    x, y = rng.normal(size=(n, dim)) @ mix, rng.normal(size=(m, dim)) @ mix + 0.5
    cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    slow = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * np.real(sqrtm(cx @ cy)))
    assert frechet_distance(x, y) == pytest.approx(slow, rel=1e-3 if min(n, m) <= dim else 1e-5)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-4 * np.trace(cx))


def test_frechet_of_shifted_copies_is_the_squared_shift() -> None:
    x = np.random.default_rng(0).normal(size=(50, 5))
    assert frechet_distance(x, x + 2.0) == pytest.approx(20.0, rel=1e-9)


def test_density_and_coverage_do_not_swap_generated_and_real() -> None:
    """After mode collapse density is high and coverage low; with swapped arguments they are not."""
    rng = np.random.default_rng(1)
    modes = np.repeat(np.eye(8) * 10, 25, axis=0)
    real = modes + 0.3 * rng.normal(size=modes.shape)
    collapsed = np.tile(np.eye(8)[:1] * 10, (200, 1)) + 0.05 * rng.normal(size=(200, 8))
    density, coverage = density_and_coverage(collapsed, real, 5)
    assert density > 1.0
    assert coverage <= 1 / 8
    swapped_density, swapped_coverage = density_and_coverage(real, collapsed, 5)
    assert swapped_density < 0.5
    assert (swapped_density, swapped_coverage) != (density, coverage)
    good = density_and_coverage(modes + 0.3 * rng.normal(size=modes.shape), real, 5)
    assert good[1] > 0.9
    with pytest.raises(ValueError, match="real images"):
        density_and_coverage(real, real[:5], 5)


def test_squared_distances_and_bandwidth() -> None:
    x = np.random.default_rng(2).normal(size=(6, 3))
    direct = ((x[:, None] - x[None]) ** 2).sum(-1)
    assert np.allclose(squared_distances(x, x), direct)
    assert median_bandwidth(x) == pytest.approx(np.median(np.sqrt(direct[np.triu_indices(6, 1)])))
    assert median_bandwidth(np.ones((3, 2))) == 1.0
