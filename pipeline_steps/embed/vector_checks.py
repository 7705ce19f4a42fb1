"""Checks of vectors: finite, not zero, unit length."""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.errors import DataError

NONFINITE = "EMB_NONFINITE"
ZERO = "EMB_ZERO"
TOLERANCE = 1e-4


def validate_vectors(vectors: FloatArray) -> list[str]:
    """Code of each row of [N, D]: "" if it is valid, EMB_NONFINITE for NaN or infinity, EMB_ZERO for a zero vector."""
    return [NONFINITE if not np.isfinite(row).all() else ZERO if not row.any() else "" for row in vectors]


def assert_unit(vectors: FloatArray, what: str) -> None:
    """Raise DataError if a row of [N, D] is not finite or its norm differs from 1 by more than 1e-4."""
    if not len(vectors):
        return
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not np.isfinite(norms).all() or np.abs(norms - 1.0).max() > TOLERANCE:
        raise DataError(f"{what}: rows do not have unit length (norms {norms.min():.4g} to {norms.max():.4g})")
