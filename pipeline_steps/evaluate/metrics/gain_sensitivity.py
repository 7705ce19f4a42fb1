"""Gain sensitivity: how much generated images change when the same clip is louder or softer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.evaluate.metrics.bootstrap import Estimate, mean_estimate


def gain_distances(
    features: Mapping[float, DoubleArray], groups: Sequence[str], num_bootstrap: int, seed: int
) -> dict[str, Estimate]:
    """Mean cosine distances (0: equal, 1: unrelated) between generated images in the space of a judge.

    Args:
        features: gain in dB -> unit rows [M, S, K], with an entry for 0.0. Sample s has the same noise at every gain.
        groups: near-duplicate group of each of the M clips, the clusters of the intervals.
        num_bootstrap: bootstrap resamples.
        seed: of the resampling.

    Returns:
        `gain_<dB>_db`: same clip and noise, other gain. For scale: `other_noise`: same clip, other noise, and `other_sound`:
        other clip, same noise.
    """
    base = features[0.0]
    distances = {f"gain_{gain:+g}_db": _distance(rows, base) for gain, rows in sorted(features.items()) if gain != 0.0}
    clips, samples = base.shape[:2]
    if samples > 1:
        distances["other_noise"] = _distance(base, np.roll(base, 1, axis=1))
    if clips > 1:
        distances["other_sound"] = _distance(base, np.roll(base, 1, axis=0))
    return {name: mean_estimate(found.mean(1), groups, num_bootstrap, seed) for name, found in distances.items()}


def _distance(left: DoubleArray, right: DoubleArray) -> DoubleArray:
    return np.asarray(1.0 - (left * right).sum(-1))
