"""Distances between generated and real images in the features of a judge. Rows are images, float64 [N, D].

Samples of one clip are not independent of each other. Pairs within a cluster (one clip, one image group) are therefore left
out of the within-set means, which keeps the estimate unbiased for "sample a clip, then an image". With one item per cluster
this is the textbook estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.linalg import cholesky, eigvalsh, svdvals

from pipeline_steps.core.array_types import BoolArray, DoubleArray
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.evaluate.metrics.bootstrap import Estimate, cluster_index, percentile_interval, resample_counts

Kernel = Callable[[DoubleArray, DoubleArray], DoubleArray]
CMMD_BANDWIDTH = 10.0


def kid_kernel(x: DoubleArray, y: DoubleArray) -> DoubleArray:
    """k(x, y) = (x.y / D + 1)^3, the kernel of KID (Binkowski et al. 2018, arXiv 1801.01401, section 4)."""
    return np.asarray((x @ y.T / x.shape[1] + 1.0) ** 3)


def rbf_kernel(bandwidth: float) -> Kernel:
    """k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)), the kernel of CMMD (Jayasumana et al. 2024, arXiv 2401.09603, section 4)."""

    def kernel(x: DoubleArray, y: DoubleArray) -> DoubleArray:
        return np.asarray(np.exp(-squared_distances(x, y) / (2.0 * bandwidth**2)))

    return kernel


def cmmd_kernel(x: DoubleArray, y: DoubleArray) -> DoubleArray:
    """Kernel of CMMD: `rbf_kernel` of bandwidth 10 on unit rows (Jayasumana et al. 2024, section 4)."""
    return rbf_kernel(CMMD_BANDWIDTH)(l2_normalize(x), l2_normalize(y))


def squared_distances(x: DoubleArray, y: DoubleArray) -> DoubleArray:
    """|x_i - y_j|^2 as [N, M], clipped at zero."""
    cross = (x**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2.0 * x @ y.T
    return np.asarray(np.maximum(cross, 0.0))


def median_bandwidth(reference: DoubleArray) -> float:
    """Median distance between rows of `reference` [N, D] (the median heuristic, Gretton et al. 2012, section 8).

    `reference` holds real images only, so that the bandwidth does not depend on the model.
    """
    squared = squared_distances(reference, reference)[np.triu_indices(len(reference), k=1)]
    median = float(np.sqrt(np.median(squared))) if len(squared) else 0.0
    return median if median > 0 else 1.0


def mmd_squared(
    generated: DoubleArray, real: DoubleArray, kernel: Kernel, generated_clusters: Sequence[str], real_clusters: Sequence[str]
) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) over clusters; can be below zero.

    Raises:
        ValueError: one side has fewer than two clusters.
    """
    return _ClusterSums(generated, real, kernel, generated_clusters, real_clusters).value()


def mmd_bootstrap(
    generated: DoubleArray,
    real: DoubleArray,
    kernel: Kernel,
    generated_clusters: Sequence[str],
    real_clusters: Sequence[str],
    num_bootstrap: int,
    seed: int,
    scale: float = 1.0,
) -> tuple[Estimate, DoubleArray]:
    """`mmd_squared` times `scale` with an interval, and its bootstrap values [num_bootstrap].

    Clusters of both sides are resampled with replacement. The same clusters and seed give the same resamples, so the values of
    two models are paired. A resampled cluster is not compared with its own copy, because their kernel value is not that of
    independent items; this keeps the bootstrap distribution centered on the estimate. With two clusters on a side only one
    value remains, so an interval needs three.
    """
    sums = _ClusterSums(generated, real, kernel, generated_clusters, real_clusters)
    generator = np.random.default_rng(seed)
    counts_x = resample_counts(sums.n_x, num_bootstrap, generator).astype(np.float64)
    counts_y = resample_counts(sums.n_y, num_bootstrap, generator).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        resampled = np.asarray(sums.values(counts_x, counts_y) * scale)
    low, high = percentile_interval(resampled) if min(sums.n_x, sums.n_y) > 2 else (None, None)
    return Estimate(sums.value() * scale, low, high, len(generated), sums.n_x), resampled


class _ClusterSums:
    """Kernel sums between clusters, of which the value of a resample is a weighted sum."""

    def __init__(
        self,
        generated: DoubleArray,
        real: DoubleArray,
        kernel: Kernel,
        generated_clusters: Sequence[str],
        real_clusters: Sequence[str],
    ) -> None:
        x, y = np.asarray(generated, np.float64), np.asarray(real, np.float64)
        index_x, self.n_x = cluster_index(generated_clusters)
        index_y, self.n_y = cluster_index(real_clusters)
        if self.n_x < 2 or self.n_y < 2:
            raise ValueError(f"a distance needs two or more clusters on both sides, got {self.n_x} generated, {self.n_y} real")
        into_x, into_y = np.eye(self.n_x)[index_x], np.eye(self.n_y)[index_y]  # membership [N, clusters]
        self.size_x, self.size_y = into_x.sum(0), into_y.sum(0)
        self.xx = into_x.T @ kernel(x, x) @ into_x
        self.yy = into_y.T @ kernel(y, y) @ into_y
        self.xy = into_x.T @ kernel(x, y) @ into_y
        np.fill_diagonal(self.xx, 0.0)
        np.fill_diagonal(self.yy, 0.0)

    def value(self) -> float:
        """MMD^2 of the whole sets."""
        return float(self.values(np.ones((1, self.n_x)), np.ones((1, self.n_y)))[0])

    def values(self, weight_x: DoubleArray, weight_y: DoubleArray) -> DoubleArray:
        """MMD^2 [B] under cluster weights [B, clusters] of both sides."""
        within_x = _quadratic(weight_x, self.xx) / _pairs(weight_x, self.size_x)
        within_y = _quadratic(weight_y, self.yy) / _pairs(weight_y, self.size_y)
        total = (weight_x @ self.size_x) * (weight_y @ self.size_y)
        between = ((weight_x @ self.xy) * weight_y).sum(1) / total
        return np.asarray(within_x + within_y - 2.0 * between)


def _quadratic(weights: DoubleArray, matrix: DoubleArray) -> DoubleArray:
    return np.asarray(((weights @ matrix) * weights).sum(1))


def _pairs(weights: DoubleArray, sizes: DoubleArray) -> DoubleArray:
    """Number of ordered pairs of items from different clusters in each resample."""
    weighted = weights * sizes
    return np.asarray(weighted.sum(1) ** 2 - (weighted**2).sum(1))


def frechet_distance(x: DoubleArray, y: DoubleArray) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) (Heusel et al. 2017, eq. 6), C with divisor N - 1.

    For N < D the trace of the root is the sum of the singular values of the centered Gram matrix. Otherwise it follows from the
    eigenvalues of L^T C_y L with C_x = L L^T. Both avoid the matrix square root, the slow part of FID. The estimate is biased
    upwards, strongly so if N is not much larger than D; compare values at equal N only.
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


def density_coverage_bootstrap(
    generated: DoubleArray,
    real: DoubleArray,
    k: int,
    generated_clusters: Sequence[str],
    real_clusters: Sequence[str],
    num_bootstrap: int,
    seed: int,
) -> tuple[tuple[Estimate, DoubleArray], tuple[Estimate, DoubleArray]]:
    """Density and coverage (Naeem et al. 2020, arXiv 2002.09797, eqs. 4 and 5), with intervals and bootstrap values.

    Density: number of balls around real images that hold a generated image, divided by `k`. 1 is as dense as real images; it
    may exceed 1. Coverage: fraction of the balls that hold a generated image. A collapsed model has high density and low
    coverage. Density is a mean over generated images, so their clusters are resampled. Coverage is a mean over real images, so
    theirs are; a resample without some generated images would only lower it. A single cluster gives no interval.

    Returns:
        (estimate, bootstrap values [num_bootstrap]) of density and of coverage.

    Raises:
        ValueError: `real` has no more than `k` rows.
    """
    if not 0 < k < len(real):
        raise ValueError(f"density needs more than {k} real images, got {len(real)}")
    inside = _inside(generated, real, k)
    generator = np.random.default_rng(seed)
    found = []
    for values, clusters in ((inside.sum(1) / k, generated_clusters), (inside.any(0).astype(np.float64), real_clusters)):
        index, n_clusters = cluster_index(clusters)
        counts = resample_counts(n_clusters, num_bootstrap, generator)
        sums = np.bincount(index, weights=values, minlength=n_clusters)
        sizes = np.bincount(index, minlength=n_clusters)
        resampled = np.asarray((counts @ sums) / (counts @ sizes), np.float64)
        low, high = percentile_interval(resampled) if n_clusters > 1 else (None, None)
        found.append((Estimate(float(values.mean()), low, high, len(index), n_clusters), resampled))
    return found[0], found[1]


def _inside(generated: DoubleArray, real: DoubleArray, k: int) -> BoolArray:
    """[N, M]: whether generated image i lies in the ball around real image j that reaches to its k-th nearest real image."""
    radius = np.sort(squared_distances(real, real), axis=1)[:, k]  # column 0 is the row itself
    return np.asarray(squared_distances(generated, real) < radius[None, :])
