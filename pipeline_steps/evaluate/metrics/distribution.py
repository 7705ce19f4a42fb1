"""Distances between drawn and real pictures in the feature space of a judge. Rows are pictures, float64 [N, D].

Samples drawn from one sound are not independent of each other, so pairs within a cluster (one sound, one picture group)
are left out of the within-set means: the estimate stays unbiased for "draw a sound, then a picture". With clusters of one
item each this is the textbook estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import cholesky, eigvalsh, svdvals

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.evaluate.metrics.bootstrap import Estimate, cluster_index, percentile_interval, resample_counts

Kernel = Callable[[DoubleArray, DoubleArray], DoubleArray]
CMMD_BANDWIDTH = 10.0


def polynomial_kernel(x: DoubleArray, y: DoubleArray) -> DoubleArray:
    """k(x, y) = (x.y / D + 1)^3, the kernel of KID (Binkowski et al. 2018, arXiv 1801.01401, section 4)."""
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def rbf_kernel(bandwidth: float) -> Kernel:
    """k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)), the kernel of CMMD (Jayasumana et al. 2024, arXiv 2401.09603, section 4)."""

    def kernel(x: DoubleArray, y: DoubleArray) -> DoubleArray:
        return np.asarray(np.exp(-squared_distances(x, y) / (2.0 * bandwidth**2)))

    return kernel


def cmmd_kernel(x: DoubleArray, y: DoubleArray) -> DoubleArray:
    """The kernel of CMMD itself: `rbf_kernel` of bandwidth 10 on unit rows (Jayasumana et al. 2024, section 4)."""
    return rbf_kernel(CMMD_BANDWIDTH)(l2_normalize(x), l2_normalize(y))


def squared_distances(x: DoubleArray, y: DoubleArray) -> DoubleArray:
    """|x_i - y_j|^2 as [N, M], never below zero."""
    cross = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2.0 * x @ y.T
    return np.asarray(np.maximum(cross, 0.0))


def median_bandwidth(reference: DoubleArray) -> float:
    """Median distance between rows of `reference` [N, D] (the median heuristic, Gretton et al. 2012, section 8).

    Taken from real pictures alone, so that the ruler does not depend on what is measured with it.
    """
    squared = squared_distances(reference, reference)[np.triu_indices(len(reference), k=1)]
    median = float(np.sqrt(np.median(squared))) if len(squared) else 0.0
    return median if median > 0 else 1.0


def mmd_squared(
    drawn: DoubleArray, real: DoubleArray, kernel: Kernel, drawn_clusters: Sequence[str], real_clusters: Sequence[str]
) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) over clusters; can be below zero.

    Raises:
        ValueError: fewer than two clusters on one side: a distance between sets needs sets.
    """
    sums = _ClusterSums(drawn, real, kernel, drawn_clusters, real_clusters)
    ones_x, ones_y = np.ones((1, sums.n_x)), np.ones((1, sums.n_y))
    return float(sums.values(ones_x, ones_y)[0])


def mmd_draws(
    drawn: DoubleArray,
    real: DoubleArray,
    kernel: Kernel,
    drawn_clusters: Sequence[str],
    real_clusters: Sequence[str],
    repeats: int,
    seed: int,
    scale: float = 1.0,
) -> tuple[Estimate, DoubleArray]:
    """`mmd_squared` times `scale`, with an interval, and its bootstrap draws [repeats], which take clusters of both sides with
    replacement. Same clusters and seed, same resampling: two models' draws are pairs.

    A cluster drawn twice is never compared with its own copy (their kernel value is not that of two independent items),
    which keeps the bootstrap distribution centred on the estimate. Of two clusters only the draw that holds both has a
    value then, always the same: with fewer than three on a side there is no interval.
    """
    sums = _ClusterSums(drawn, real, kernel, drawn_clusters, real_clusters)
    value = float(sums.values(np.ones((1, sums.n_x)), np.ones((1, sums.n_y)))[0]) * scale
    generator = np.random.default_rng(seed)
    counts_x = resample_counts(sums.n_x, repeats, generator).astype(np.float64)
    counts_y = resample_counts(sums.n_y, repeats, generator).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = np.asarray(sums.values(counts_x, counts_y) * scale)
    low, high = percentile_interval(draws) if min(sums.n_x, sums.n_y) > 2 else (None, None)
    return Estimate(value, low, high, len(drawn), sums.n_x), draws


class _ClusterSums:
    """Kernel sums between clusters; a bootstrap repeat is then a weighted sum of a small matrix."""

    def __init__(
        self, drawn: DoubleArray, real: DoubleArray, kernel: Kernel, drawn_clusters: Sequence[str], real_clusters: Sequence[str]
    ) -> None:
        x, y = np.asarray(drawn, np.float64), np.asarray(real, np.float64)
        index_x, self.n_x = cluster_index(drawn_clusters)
        index_y, self.n_y = cluster_index(real_clusters)
        if self.n_x < 2 or self.n_y < 2:
            raise ValueError(f"a distance needs two or more clusters on both sides, got {self.n_x} drawn, {self.n_y} real")
        into_x, into_y = np.eye(self.n_x)[index_x], np.eye(self.n_y)[index_y]  # membership [N, clusters]
        self.size_x, self.size_y = into_x.sum(0), into_y.sum(0)
        self.xx = into_x.T @ kernel(x, x) @ into_x
        self.yy = into_y.T @ kernel(y, y) @ into_y
        self.xy = into_x.T @ kernel(x, y) @ into_y
        np.fill_diagonal(self.xx, 0.0)
        np.fill_diagonal(self.yy, 0.0)

    def values(self, weight_x: DoubleArray, weight_y: DoubleArray) -> DoubleArray:
        """MMD^2 [repeats] under cluster weights [repeats, clusters] of both sides."""
        within_x = _quadratic(weight_x, self.xx) / _pairs(weight_x, self.size_x)
        within_y = _quadratic(weight_y, self.yy) / _pairs(weight_y, self.size_y)
        total = (weight_x @ self.size_x) * (weight_y @ self.size_y)
        between = ((weight_x @ self.xy) * weight_y).sum(1) / total
        return np.asarray(within_x + within_y - 2.0 * between)


def _quadratic(weights: DoubleArray, matrix: DoubleArray) -> DoubleArray:
    return np.asarray(((weights @ matrix) * weights).sum(1))


def _pairs(weights: DoubleArray, sizes: DoubleArray) -> DoubleArray:
    """How many ordered pairs of items from different original clusters each repeat holds."""
    weighted = weights * sizes
    return np.asarray(weighted.sum(1) ** 2 - (weighted**2).sum(1))


def frechet_distance(x: DoubleArray, y: DoubleArray) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) (Heusel et al. 2017, eq. 6), C with divisor N - 1.

    With few rows (N < D) the trace of the root is the sum of singular values of the centred Gram matrix; with many, the
    eigenvalues of L^T C_y L where C_x = L L^T. Neither forms a matrix square root, which is what makes FID slow.
    The estimate is biased upwards and strongly so when N is near D or below it: never compare it across N.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or len(y) < 2:
        raise ValueError("a Frechet distance needs two or more rows on both sides")
    mean_gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    xc = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    yc = (y - y.mean(0)) / np.sqrt(len(y) - 1)
    traces = (xc**2).sum() + (yc**2).sum()
    if min(len(x), len(y)) <= x.shape[1]:
        root = svdvals(xc @ yc.T).sum()
    else:
        covariance = xc.T @ xc
        covariance[np.diag_indices_from(covariance)] += 1e-12 * max(np.trace(covariance), 1e-300) / len(covariance)
        factor = cholesky(covariance, lower=True)
        half = yc @ factor
        root = np.sqrt(np.maximum(eigvalsh(half.T @ half), 0.0)).sum()
    return float(mean_gap + traces - 2.0 * root)


def density_coverage(drawn: DoubleArray, real: DoubleArray, neighbours: int) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, eqs. 4 and 5) with balls around REAL pictures.

    Density: how many real balls hold a drawn picture, per `neighbours` (1 is as dense as real, may exceed 1).
    Coverage: share of real balls that hold at least one drawn picture; a collapsed model has high density, low coverage.

    Raises:
        ValueError: `real` has no `neighbours`-th other row.
    """
    if not 0 < neighbours < len(real):
        raise ValueError(f"density needs more than {neighbours} real pictures, got {len(real)}")
    inside = _inside(drawn, real, neighbours)
    return float(inside.sum() / (neighbours * len(drawn))), float(inside.any(0).mean())


def density_coverage_draws(
    drawn: DoubleArray,
    real: DoubleArray,
    neighbours: int,
    drawn_clusters: Sequence[str],
    real_clusters: Sequence[str],
    repeats: int,
    seed: int,
) -> tuple[tuple[Estimate, DoubleArray], tuple[Estimate, DoubleArray]]:
    """Density and coverage, each with its bootstrap draws [repeats]; the balls stay those of all real pictures.

    Density is a mean over drawn pictures: their clusters are drawn. Coverage is a share of real pictures: theirs are, because
    leaving out drawings can only lower it. Each has the n of what it is a mean of, and no interval from a single cluster.
    """
    inside = _inside(drawn, real, neighbours)
    generator = np.random.default_rng(seed)
    found = []
    for values, clusters in ((inside.sum(1) / neighbours, drawn_clusters), (inside.any(0).astype(np.float64), real_clusters)):
        index, n_clusters = cluster_index(clusters)
        counts = resample_counts(n_clusters, repeats, generator)
        sums = np.bincount(index, weights=values, minlength=n_clusters)
        sizes = np.bincount(index, minlength=n_clusters)
        draws = np.asarray((counts @ sums) / (counts @ sizes), np.float64)
        low, high = percentile_interval(draws) if n_clusters > 1 else (None, None)
        found.append((Estimate(float(values.mean()), low, high, len(index), n_clusters), draws))
    return found[0], found[1]


def _inside(drawn: DoubleArray, real: DoubleArray, neighbours: int) -> npt.NDArray[np.bool_]:
    """[N drawn, N real]: is the drawn picture in the ball that reaches from a real one to its `neighbours`-th neighbour?"""
    radius = np.sort(squared_distances(real, real), axis=1)[:, neighbours]  # column 0 is the row itself
    return np.asarray(squared_distances(drawn, real) < radius[None, :])
