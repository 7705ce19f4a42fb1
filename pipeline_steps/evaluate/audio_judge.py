"""A judge of "does this picture fit this sound?" that needs no test picture: a linear map from sound to picture features.

Learned in closed form on the TRAINING pairs' real pictures and sounds, with judge encoders that took no part in making the
pairs. It knows what the training pairs taught (their mistakes included) and nothing of the model that is judged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.vectors import unit_rows

FloatArray = npt.NDArray[np.float64]

MIN_PAIRS = 3
"""Fewer training pairs cannot be fitted."""

PENALTIES = tuple(float(value) for value in np.logspace(-3, 3, 13))


@dataclass(frozen=True, slots=True)
class AudioImageJudge:
    """Ridge regression from unit sound embeddings [D_a] to unit picture features [D_p].

    Attributes:
        weights: [D_a, D_p].
        sound_mean: [D_a], picture_mean: [D_p]; of the training rows.
        penalty: the ridge penalty chosen by leave-one-out error.
        loo_r2: 1 - leave-one-out error / variance: how much of a picture's features a sound foretells. Near 0 is a weak judge.
        n: training pairs.
    """

    weights: FloatArray
    sound_mean: FloatArray
    picture_mean: FloatArray
    penalty: float
    loo_r2: float
    n: int

    def predict(self, sounds: npt.ArrayLike) -> FloatArray:
        """Picture directions [N, D_p], unit rows, that sounds [N, D_a] ask for."""
        return unit_rows(unit_rows(np.asarray(sounds, np.float64) - self.sound_mean) @ self.weights)

    def look(self, pictures: npt.ArrayLike) -> FloatArray:
        """Picture features [..., D_p] in the judge's centred unit space: its agreement is predict(sound) . look(picture)."""
        return unit_rows(np.asarray(pictures, np.float64) - self.picture_mean)


def fit(sounds: npt.ArrayLike, pictures: npt.ArrayLike) -> AudioImageJudge:
    """Fit on training pairs: row i of `sounds` [N, D_a] goes with row i of `pictures` [N, D_p].

    The penalty (relative to the largest singular value squared) minimises the exact leave-one-out error, which ridge
    regression gives in closed form (Golub, Heath & Wahba 1979; Hastie et al., Elements of Statistical Learning, eq. 7.52).

    Raises:
        ValueError: fewer than three pairs.
    """
    raw_sounds, raw_pictures = np.asarray(sounds, np.float64), np.asarray(pictures, np.float64)
    if len(raw_sounds) < MIN_PAIRS or len(raw_sounds) != len(raw_pictures):
        raise ValueError(f"the audio-image judge needs three or more pairs, got {len(raw_sounds)} and {len(raw_pictures)}")
    sound_mean, picture_mean = raw_sounds.mean(0), raw_pictures.mean(0)
    x, y = unit_rows(raw_sounds - sound_mean), unit_rows(raw_pictures - picture_mean)
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    projected = left.T @ y
    best: tuple[float, float] | None = None
    for relative in PENALTIES:
        penalty = relative * singular[0] ** 2
        shrink = singular**2 / (singular**2 + penalty)
        leverage = (left**2) @ shrink
        residual = (y - left @ (shrink[:, None] * projected)) / np.maximum(1.0 - leverage, 1e-9)[:, None]
        error = float((residual**2).mean())
        if best is None or error < best[0]:
            best = (error, penalty)
    assert best is not None
    error, penalty = best
    weights = right.T @ ((singular / (singular**2 + penalty))[:, None] * projected)
    return AudioImageJudge(weights, sound_mean, picture_mean, penalty, 1.0 - error / float((y**2).mean()), len(x))
