"""Whitened feature space: features of a judge, centered and scaled by the variation within classes.

Features of a network that was trained for another task vary with viewpoint, color and drawing style. Dividing by the covariance
within classes of real images (within-class covariance normalization, Hatch et al. 2006; the whitening step of linear
discriminant analysis) reduces such directions. Without labels it is plain whitening. The fit uses no generated image, no
image of an evaluated pair and no audio, so it cannot favor a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.core.l2_normalize import l2_normalize

MIN_IMAGES = 3
"""Calibration images below which the space cannot be fitted."""


@dataclass(frozen=True, slots=True)
class WhitenedFeatureSpace:
    """Projection of features [..., D] to unit rows [..., K], whose product is the similarity.

    Attributes:
        mean: [D] of the calibration images.
        scaling: [D, K].
        kind: `within-class`, `whitened` (no labels) or `plain` (too few images for a covariance).
        n: calibration images.
        classes: classes with two or more calibration images.
    """

    mean: DoubleArray
    scaling: DoubleArray
    kind: str
    n: int
    classes: int

    def project(self, features: npt.ArrayLike) -> DoubleArray:
        """Unit rows of features [..., D]."""
        return l2_normalize((np.asarray(features, np.float64) - self.mean) @ self.scaling)


def fit_space(features: npt.ArrayLike, labels: Sequence[str | None], shrinkage: float) -> WhitenedFeatureSpace:
    """Fit the space on calibration images.

    Args:
        features: [N, D] of real images that no evaluated pair uses.
        labels: class of each image; an image without a class counts for the mean alone.
        shrinkage: added to every variance, relative to the mean variance. It limits the weight of directions with a small one.

    Raises:
        ValueError: fewer than `MIN_IMAGES` images, or the lengths differ.
    """
    rows = np.asarray(features, np.float64)
    if len(rows) < MIN_IMAGES or len(rows) != len(labels):
        raise ValueError(f"a judge needs {MIN_IMAGES} or more calibration images, got {len(rows)} with {len(labels)} labels")
    mean = rows.mean(0)
    names = np.asarray([name if name is not None else "" for name in labels], dtype=object)
    residuals = []
    classes = [name for name in sorted(set(names)) if name and (names == name).sum() > 1]
    for name in classes:
        members = rows[names == name]
        residuals.append((members - members.mean(0)) * np.sqrt(len(members) / (len(members) - 1)))
    spread = np.concatenate(residuals) if residuals else rows - mean
    kind = "within-class" if residuals else "whitened"
    if len(spread) < MIN_IMAGES:
        return WhitenedFeatureSpace(mean, np.eye(rows.shape[1]), "plain", len(rows), 0)
    _, singular, axes = np.linalg.svd(spread / np.sqrt(len(spread)), full_matrices=True)
    variance = np.zeros(rows.shape[1])
    variance[: len(singular)] = singular**2
    scale = 1.0 / np.sqrt(variance + shrinkage * max(float(variance.mean()), 1e-12))
    return WhitenedFeatureSpace(mean, axes.T * scale, kind, len(rows), len(classes))
