"""Sample-rate conversion."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import soxr


def resample(samples: npt.NDArray[np.float32], from_rate: int, to_rate: int) -> npt.NDArray[np.float32]:
    """Resample mono float32 [T] with soxr's high-quality, linear-phase recipe.

    Args:
        samples: [T].
        from_rate: Hz of `samples`.
        to_rate: Hz wanted.

    Returns:
        float32, about T * to_rate / from_rate samples; the input itself when the rates agree.
    """
    if from_rate == to_rate:
        return np.asarray(samples, dtype=np.float32)
    return np.asarray(soxr.resample(np.asarray(samples, dtype=np.float32), from_rate, to_rate, quality="HQ"), dtype=np.float32)
