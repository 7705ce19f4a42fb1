"""Audio-image agreement without a real image: ridge regression from audio features to image features.

The regression is fitted in closed form on the real images and audio of the training pairs. Both encoders are judges, so they
took no part in making the pairs. It reproduces the mistakes of the training pairs and does not depend on the evaluated model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray, IntArray
from pipeline_steps.core.l2_normalize import l2_normalize

MIN_PAIRS, MIN_GROUPS = 3, 2
"""Training pairs, and audio groups among them, below which the regression cannot be fitted."""

WEAK_R2 = 0.05
"""R^2 below which the report warns that the regression predicts little."""

PENALTIES = tuple(float(value) for value in np.logspace(-3, 3, 13))


@dataclass(frozen=True, slots=True)
class AudioToImageRegressor:
    """Ridge regression with intercept from unit audio embeddings [D_a] to unit image features [D_p].

    Attributes:
        weights: [D_a, D_p].
        audio_mean, image_mean: [D_a] and [D_p], of the unit training rows.
        penalty: ridge penalty with the smallest leave-group-out error.
        group_out_r2: R^2 on audio groups left out of the fit, relative to the mean image of the other groups. 0 or less: the
            regression predicts nothing for new audio.
        n: training pairs.
        groups: audio groups among them.
    """

    weights: DoubleArray
    audio_mean: DoubleArray
    image_mean: DoubleArray
    penalty: float
    group_out_r2: float
    n: int
    groups: int

    def predict(self, audio: npt.ArrayLike) -> DoubleArray:
        """Predicted image features [N, D_p] of audio embeddings [N, D_a], as unit rows."""
        return l2_normalize((l2_normalize(np.asarray(audio, np.float64)) - self.audio_mean) @ self.weights)

    def project(self, images: npt.ArrayLike) -> DoubleArray:
        """Centered unit rows of image features [..., D_p]; their product with predictions is the agreement."""
        return l2_normalize(l2_normalize(np.asarray(images, np.float64)) - self.image_mean)


def has_enough_groups(groups: Sequence[str]) -> bool:
    """Whether training pairs with these audio groups suffice for a fit."""
    return len(groups) >= MIN_PAIRS and len(set(groups)) >= MIN_GROUPS


def fit(audio: npt.ArrayLike, images: npt.ArrayLike, groups: Sequence[str]) -> AudioToImageRegressor:
    """Fit the regression on training pairs.

    The penalty (relative to the largest singular value squared) minimizes the exact error on audio groups that are left out.
    Leaving out single pairs would reward memorizing a recording that other pairs share.

    Args:
        audio: embeddings [N, D_a] of the pairs' audio.
        images: features [N, D_p] of the pairs' images.
        groups: near-duplicate group of each pair's audio.

    Raises:
        ValueError: fewer than `MIN_PAIRS` pairs or `MIN_GROUPS` groups, or the lengths differ.
    """
    x, y = l2_normalize(np.asarray(audio, np.float64)), l2_normalize(np.asarray(images, np.float64))
    members = [np.flatnonzero(np.asarray(groups, dtype=object) == name) for name in sorted(set(groups))]
    if not has_enough_groups(groups) or not len(x) == len(y) == len(groups):
        raise ValueError(
            f"audio-image regression needs {MIN_PAIRS} or more pairs of {MIN_GROUPS} or more audio groups, "
            f"got {len(x)} clips of {len(members)} groups and {len(y)} images"
        )
    audio_mean, image_mean = x.mean(0), y.mean(0)
    left, singular, right = np.linalg.svd(x - audio_mean, full_matrices=False)
    centered = y - image_mean
    best: tuple[float, float] | None = None
    for relative in PENALTIES:
        penalty = relative * max(singular[0] ** 2, 1e-12)
        shrink = singular**2 / (singular**2 + penalty)
        error = _group_out_error(centered, left, shrink, members)
        if best is None or error < best[0]:
            best = (error, penalty)
    assert best is not None
    error, penalty = best
    weights = right.T @ ((singular / (singular**2 + penalty))[:, None] * (left.T @ centered))
    error_of_mean = _group_out_error(centered, left, np.zeros_like(singular), members)
    return AudioToImageRegressor(weights, audio_mean, image_mean, penalty, 1.0 - error / error_of_mean, len(x), len(members))


def _group_out_error(centered: DoubleArray, left: DoubleArray, shrink: DoubleArray, members: Sequence[IntArray]) -> float:
    """Squared error over all groups, each predicted by a fit (with intercept) without it: residuals (I - H_gg)^-1 e_g.

    This is the block form of the leave-one-out identity of ridge regression (Golub, Heath & Wahba 1979; Hastie et al., Elements
    of Statistical Learning, eq. 7.52). The hat matrix H is left diag(shrink) left^T + 1/N, where 1/N belongs to the intercept.
    Fixed means would reveal the images of the left-out group, because all centered images add up to zero.
    """
    residual = centered - left @ (shrink[:, None] * (left.T @ centered))
    error = 0.0
    for rows in members:
        remaining = np.eye(len(rows)) - 1.0 / len(centered) - (left[rows] * shrink) @ left[rows].T
        error += float((np.linalg.solve(remaining, residual[rows]) ** 2).sum())
    return error
