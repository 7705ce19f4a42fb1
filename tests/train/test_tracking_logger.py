"""Names and steps under which the training logs."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.tracking import NoOpTracker
from pipeline_steps.train.tracking_logger import TrackingLogger


@pytest.mark.parametrize(("step", "number"), [(0, 0), (100, 0), (200, 1), (250, 2)])
def test_sample_grids_are_numbered_by_validation_from_zero(step: int, number: int) -> None:
    logged: list[tuple[str, int]] = []

    class Recorder(NoOpTracker):
        def log_image(self, key: str, image: ByteArray, step: int = 0) -> None:
            logged.append((key, step))

    TrackingLogger(Recorder(), "toy", 100).log_image("samples/grid", np.zeros((2, 2, 3), np.uint8), step)
    assert logged == [("samples/grid_by_validation", number)]
