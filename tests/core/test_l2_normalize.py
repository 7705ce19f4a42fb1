"""Tests of L2 normalization: exact values, zero rows, NaN rows."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.core.l2_normalize import l2_normalize


def test_zero_rows_stay_zero_and_nan_stays_nan() -> None:
    rows = l2_normalize(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert np.isnan(l2_normalize(np.array([[np.nan, 1.0]], np.float32))).all()


@pytest.mark.parametrize(("kind", "norms_in"), [(np.float32, np.float64), (np.float32, np.float32), (np.float64, np.float64)])
def test_norms_and_quotients_are_computed_in_the_given_type(kind: type, norms_in: type) -> None:
    rows = np.random.default_rng(0).normal(size=(200, 3, 33)).astype(kind)
    wanted = (rows.astype(norms_in) / np.linalg.norm(rows.astype(norms_in), axis=-1, keepdims=True)).astype(kind)
    made = l2_normalize(rows, norms_in)
    assert made.dtype == kind
    assert np.array_equal(made, wanted)
