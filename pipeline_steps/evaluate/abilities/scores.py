"""Scores of generated images: classes in the space of a judge, and the area of the foreground on a plain ground."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.optimize import minimize_scalar

from pipeline_steps.core.array_types import BoolArray, ByteArray, DoubleArray
from pipeline_steps.core.l2_normalize import l2_normalize

DEFAULT_TEMPERATURE = 0.1
"""Of the softmax over classes when no class has two calibration images."""
FALSE_POSITIVE_RATE = 0.05
"""Fraction of real images of other classes that pass the threshold from which a class counts as found."""
GROUND_TOLERANCE = 32
"""Gray levels by which a pixel of the ground may differ from the color of the border."""


@dataclass(frozen=True, slots=True)
class ClassSpace:
    """Classes in the space of a judge, from real calibration images.

    Attributes:
        names: of the classes, sorted.
        means: [C, K] unit class means, or unit text vectors of the names.
        counts: images per class.
        temperature: of the softmax over the cosines to the means.
        thresholds: [C] cosines that 5 % of the real images of other classes exceed.
    """

    names: tuple[str, ...]
    means: DoubleArray
    counts: Mapping[str, int]
    temperature: float
    thresholds: DoubleArray

    @classmethod
    def fit(
        cls, rows: DoubleArray, labels: Sequence[str | None], texts: Mapping[str, DoubleArray] | None = None
    ) -> Self | None:
        """Fit on unit rows [N, K] of real images; None if fewer than two classes are known.

        With `texts`, unit vectors [K] of the names of the classes, these are the means, and images fit the rest.

        The temperature maximizes the likelihood of the labels of images whose own features are left out of their class mean.
        """
        known = [row for row, label in enumerate(labels) if label is not None]
        classes = np.array([str(labels[row]) for row in known], dtype=object)
        counts = Counter(classes.tolist())
        names = tuple(sorted(counts))
        if len(names) < 2:
            return None
        features = rows[known]
        sums = np.stack([features[classes == name].sum(0) for name in names])
        means = l2_normalize(sums) if texts is None else np.stack([texts[name] for name in names])
        own = np.array([names.index(name) for name in classes])
        cosines = features @ means.T
        thresholds = np.array([np.quantile(cosines[own != row, row], 1 - FALSE_POSITIVE_RATE) for row in range(len(names))])
        if texts is not None:
            return cls(names, means, dict(counts), _fit_temperature(cosines, own), thresholds)
        shared = np.array([counts[name] > 1 for name in classes])
        left_out = cosines[shared]
        left_out[np.arange(len(left_out)), own[shared]] = (
            features[shared] * l2_normalize(sums[own[shared]] - features[shared])
        ).sum(1)
        return cls(names, means, dict(counts), _fit_temperature(left_out, own[shared]), thresholds)

    def log_odds(self, rows: DoubleArray, name: str, against: str) -> DoubleArray:
        """log p(name) - log p(against) [...] of unit rows [..., K] by the softmax over all classes."""
        first, second = self.names.index(name), self.names.index(against)
        return np.asarray(rows @ (self.means[first] - self.means[second]) / self.temperature)

    def found(self, rows: DoubleArray, name: str) -> BoolArray:
        """Whether unit rows [..., K] are nearer to the class than 95 % of the real images of other classes are."""
        row = self.names.index(name)
        return np.asarray(rows @ self.means[row] > self.thresholds[row])


def foreground_area(images: ByteArray) -> DoubleArray:
    """Fraction [...] of the pixels of images [..., H, W, 3] that differ from the median color of the border."""
    return np.asarray(_differs_from_border(images).mean((-2, -1)))


def plain_ground(images: ByteArray) -> DoubleArray:
    """Fraction [...] of the border pixels that have its median color; the area means little where it is small."""
    differs = _differs_from_border(images)
    return np.asarray(1.0 - differs[..., _border(differs.shape[-2], differs.shape[-1])].mean(-1))


def _differs_from_border(images: ByteArray) -> BoolArray:
    border = images[..., _border(images.shape[-3], images.shape[-2]), :]
    color = np.median(border, axis=-2)[..., None, None, :]
    return np.asarray((np.abs(images - color) > GROUND_TOLERANCE).any(-1))


def _border(height: int, width: int) -> BoolArray:
    mask = np.ones((height, width), bool)
    mask[1:-1, 1:-1] = False
    return mask


def _fit_temperature(cosines: DoubleArray, own: np.ndarray) -> float:
    if not len(cosines):
        return DEFAULT_TEMPERATURE

    def loss(log_temperature: float) -> float:
        logits = cosines / np.exp(log_temperature)
        logits = logits - logits.max(1, keepdims=True)
        return float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(own)), own]).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.01), np.log(2.0)), method="bounded").x))
