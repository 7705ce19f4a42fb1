"""Which vectors may enter the space."""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.errors import DataError

NONFINITE = "EMB_NONFINITE"
ZERO = "EMB_ZERO"
TOLERANCE = 1e-4


def validate_vectors(vectors: FloatArray) -> list[str]:
    """A code for each row of [N, D]: "" if it may enter, EMB_NONFINITE for NaN or infinity, EMB_ZERO for a zero vector."""
    codes = []
    for row in vectors:
        codes.append(NONFINITE if not np.isfinite(row).all() else ZERO if not row.any() else "")
    return codes


def assert_unit(vectors: FloatArray, what: str) -> None:
    """Raise DataError unless every row of [N, D] is finite and has norm 1 within 1e-4."""
    if not len(vectors):
        return
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not np.isfinite(norms).all() or np.abs(norms - 1.0).max() > TOLERANCE:
        raise DataError(f"{what}: rows are not of unit length (norms {norms.min():.4g} to {norms.max():.4g})")
