"""Does the picture change when the same sound is played louder or softer, and by how much beside other changes?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.evaluate.metrics.bootstrap import Estimate, mean_estimate


def gain_distances(looks: Mapping[float, DoubleArray], groups: Sequence[str], repeats: int, seed: int) -> dict[str, Estimate]:
    """Mean cosine distance (0 equal, 1 unrelated) between drawings in a judge's space.

    Args:
        looks: gain in dB -> unit rows [M, S, K]; 0.0 must be there. Sample s starts from the same noise at every gain.
        groups: sound group of each of the M sounds, for the interval.

    Returns:
        "gain_<dB>": the same sound and noise at another gain; and for scale "other_noise": same sound, other noise, and
        "other_sound": other sound, same noise.
    """
    base = looks[0.0]
    found = {
        f"gain_{gain:+g}_db": mean_estimate(_distance(other, base).mean(1), groups, repeats, seed)
        for gain, other in sorted(looks.items())
        if gain != 0.0
    }
    sounds, samples = base.shape[:2]
    if samples > 1:
        found["other_noise"] = mean_estimate(_distance(base, np.roll(base, 1, axis=1)).mean(1), groups, repeats, seed)
    if sounds > 1:
        found["other_sound"] = mean_estimate(_distance(base, np.roll(base, 1, axis=0)).mean(1), groups, repeats, seed)
    return found


def _distance(left: DoubleArray, right: DoubleArray) -> DoubleArray:
    return np.asarray(1.0 - (left * right).sum(-1))
