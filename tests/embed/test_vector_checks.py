"""Checks of vectors."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.core.errors import DataError
from pipeline_steps.embed.vector_checks import assert_unit, validate_vectors


def test_codes() -> None:
    rows = np.array([[0.6, 0.8], [np.nan, 1.0], [np.inf, 0.0], [0.0, 0.0]], np.float32)
    assert validate_vectors(rows) == ["", "EMB_NONFINITE", "EMB_NONFINITE", "EMB_ZERO"]
    assert validate_vectors(np.zeros((0, 3), np.float32)) == []


def test_rows_must_have_unit_length() -> None:
    assert_unit(np.array([[0.6, 0.8]], np.float32), "rows")
    assert_unit(np.zeros((0, 2), np.float32), "rows")
    for bad in ([0.6, 0.9], [0.0, 0.0], [np.nan, 1.0]):
        with pytest.raises(DataError, match="unit length"):
            assert_unit(np.array([[0.6, 0.8], bad], np.float32), "rows")
