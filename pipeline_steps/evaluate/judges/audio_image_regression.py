"""A judge of "does this picture fit this sound?" that needs no test picture: a linear map from sound to picture features.

Learned in closed form on the TRAINING pairs' real pictures and sounds, with judge encoders that took no part in making the
pairs. It knows what the training pairs taught (their mistakes included) and nothing of the model that is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray, IntArray
from pipeline_steps.core.l2_normalize import l2_normalize

MIN_PAIRS, MIN_GROUPS = 3, 2
"""Fewer training pairs, or fewer sound groups among them, cannot be fitted."""

WEAK_R2 = 0.05
"""A judge that foretells a smaller share of a picture's features than this is called weak."""

PENALTIES = tuple(float(value) for value in np.logspace(-3, 3, 13))


@dataclass(frozen=True, slots=True)
class AudioToImageRegressor:
    """Ridge regression (with intercept) from unit sound embeddings [D_a] to unit picture features [D_p].

    Attributes:
        weights: [D_a, D_p].
        sound_mean: [D_a], picture_mean: [D_p]; of the training rows at unit length.
        penalty: the ridge penalty chosen by leave-group-out error.
        group_out_r2: 1 - squared error on sound groups that the fit has not met / that of the mean picture of the others.
            At most 0 is a judge that knows nothing of new sounds, near 0 a weak one.
        n: training pairs.
        groups: sound groups among them.
    """

    weights: DoubleArray
    sound_mean: DoubleArray
    picture_mean: DoubleArray
    penalty: float
    group_out_r2: float
    n: int
    groups: int

    def predict(self, sounds: npt.ArrayLike) -> DoubleArray:
        """Picture directions [N, D_p], unit rows, that sounds [N, D_a] ask for."""
        return l2_normalize((l2_normalize(np.asarray(sounds, np.float64)) - self.sound_mean) @ self.weights)

    def look(self, pictures: npt.ArrayLike) -> DoubleArray:
        """Picture features [..., D_p] in the judge's centred unit space: its agreement is predict(sound) . look(picture)."""
        return l2_normalize(l2_normalize(np.asarray(pictures, np.float64)) - self.picture_mean)


def has_enough_groups(groups: Sequence[str]) -> bool:
    """Whether training pairs with these sound groups can be fitted."""
    return len(groups) >= MIN_PAIRS and len(set(groups)) >= MIN_GROUPS


def fit(sounds: npt.ArrayLike, pictures: npt.ArrayLike, groups: Sequence[str]) -> AudioToImageRegressor:
    """Fit on training pairs: row i of `sounds` [N, D_a] goes with row i of `pictures` [N, D_p]; its sound is of `groups[i]`.

    The penalty (relative to the largest singular value squared) minimises the exact error on sound groups left out whole:
    leaving out single pairs would reward remembering a recording that other pairs share.

    Raises:
        ValueError: fewer than three pairs or two sound groups, or lengths differ.
    """
    x, y = l2_normalize(np.asarray(sounds, np.float64)), l2_normalize(np.asarray(pictures, np.float64))
    members = [np.flatnonzero(np.asarray(groups, dtype=object) == name) for name in sorted(set(groups))]
    if not has_enough_groups(groups) or not len(x) == len(y) == len(groups):
        raise ValueError(
            "the audio-image judge needs three or more pairs of two or more sound groups, "
            f"got {len(x)} sounds of {len(members)} groups and {len(y)} pictures"
        )
    sound_mean, picture_mean = x.mean(0), y.mean(0)
    left, singular, right = np.linalg.svd(x - sound_mean, full_matrices=False)
    centred = y - picture_mean
    best: tuple[float, float] | None = None
    for relative in PENALTIES:
        penalty = relative * max(singular[0] ** 2, 1e-12)
        shrink = singular**2 / (singular**2 + penalty)
        error = _group_out_error(centred, left, shrink, members)
        if best is None or error < best[0]:
            best = (error, penalty)
    assert best is not None
    error, penalty = best
    weights = right.T @ ((singular / (singular**2 + penalty))[:, None] * (left.T @ centred))
    of_the_mean = _group_out_error(centred, left, np.zeros_like(singular), members)
    return AudioToImageRegressor(weights, sound_mean, picture_mean, penalty, 1.0 - error / of_the_mean, len(x), len(members))


def _group_out_error(centred: DoubleArray, left: DoubleArray, shrink: DoubleArray, members: Sequence[IntArray]) -> float:
    """Squared error over all groups, each foretold by a fit (intercept too) without it: residuals (I - H_gg)^-1 e_g.

    The block form of the leave-one-out identity of ridge regression (Golub, Heath & Wahba 1979; Hastie et al., Elements of
    Statistical Learning, eq. 7.52). The hat matrix H is left diag(shrink) left^T + 1/N, 1/N being the intercept's: with means
    held fixed the pictures of a left-out group would be known, since all of them add up to zero.
    """
    residual = centred - left @ (shrink[:, None] * (left.T @ centred))
    error = 0.0
    for rows in members:
        stays = np.eye(len(rows)) - 1.0 / len(centred) - (left[rows] * shrink) @ left[rows].T
        error += float((np.linalg.solve(stays, residual[rows]) ** 2).sum())
    return error
