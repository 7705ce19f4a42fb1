"""The space in which a picture judge compares: its features, centred and scaled by how pictures of one class differ.

A network trained for something else measures much that is not the class (viewpoint, colour, drawing style). Dividing by the
covariance within classes of REAL pictures that no test pair uses (within-class covariance normalisation, Hatch et al. 2006,
the whitening step of linear discriminant analysis) turns such directions down. Without labels it is plain whitening. Neither
sees a drawn picture, a test picture or a sound, so it cannot favour a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.core.l2_normalize import l2_normalize

MIN_REFERENCE = 3
"""Fewer reference pictures cannot be fitted."""


@dataclass(frozen=True, slots=True)
class WhitenedFeatureSpace:
    """Features [..., D] -> unit rows [..., K] in which a product is the judge's similarity.

    Attributes:
        mean: [D] of the reference pictures.
        scaling: [D, K].
        kind: "within-class" | "whitened" | "plain".
        n: reference pictures; classes: classes with two or more of them.
    """

    mean: DoubleArray
    scaling: DoubleArray
    kind: str
    n: int
    classes: int

    def look(self, features: npt.ArrayLike) -> DoubleArray:
        """Unit rows of features [..., D]."""
        return l2_normalize((np.asarray(features, np.float64) - self.mean) @ self.scaling)


def fit_space(features: npt.ArrayLike, labels: Sequence[str | None], shrinkage: float) -> WhitenedFeatureSpace:
    """Fit on reference pictures [N, D] with their labels (None = not known, counts for the mean only).

    Args:
        features: of real pictures that no evaluated pair uses.
        labels: class of each.
        shrinkage: added to every variance, relative to the mean variance, so that small samples stay tame.

    Raises:
        ValueError: fewer than three reference pictures.
    """
    rows = np.asarray(features, np.float64)
    if len(rows) < MIN_REFERENCE or len(rows) != len(labels):
        raise ValueError(f"a judge needs three or more reference pictures, got {len(rows)} with {len(labels)} labels")
    mean = rows.mean(0)
    names = np.asarray([name if name is not None else "" for name in labels], dtype=object)
    residuals = []
    classes = [name for name in sorted(set(names)) if name and (names == name).sum() > 1]
    for name in classes:
        members = rows[names == name]
        residuals.append((members - members.mean(0)) * np.sqrt(len(members) / (len(members) - 1)))
    spread = np.concatenate(residuals) if residuals else rows - mean
    kind = "within-class" if residuals else "whitened"
    if len(spread) < 3:
        return WhitenedFeatureSpace(mean, np.eye(rows.shape[1]), "plain", len(rows), 0)
    _, singular, axes = np.linalg.svd(spread / np.sqrt(len(spread)), full_matrices=True)
    variance = np.zeros(rows.shape[1])
    variance[: len(singular)] = singular**2
    scale = 1.0 / np.sqrt(variance + shrinkage * max(float(variance.mean()), 1e-12))
    return WhitenedFeatureSpace(mean, axes.T * scale, kind, len(rows), len(classes))
