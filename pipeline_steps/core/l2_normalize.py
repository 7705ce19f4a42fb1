"""L2 normalization of rows."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Floats = TypeVar("Floats", np.float32, np.float64)


def l2_normalize(rows: npt.NDArray[Floats], norms_in: type[np.floating[Any]] = np.float64) -> npt.NDArray[Floats]:
    """Rows [..., D] divided by their L2 norm, in their own type; a zero row stays zero and NaN stays NaN.

    Args:
        norms_in: type in which norms and quotients are computed, before they are rounded to that of `rows`. float32 is
            enough for rows that are only compared.
    """
    norms = np.linalg.norm(rows.astype(norms_in, copy=False), axis=-1, keepdims=True)
    quotients = np.divide(rows, norms, out=np.zeros(rows.shape, norms_in), where=norms != 0)
    unit: npt.NDArray[Floats] = quotients.astype(rows.dtype, copy=False)
    return unit
