"""Judge `toy`: mean colors of a grid of image regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES, ImageFeatureExtractor, JudgeSetup


class ToyConfig(StageConfig):
    """Group `evaluate.toy`."""

    grid: int = 4


@IMAGE_JUDGES.register("toy")
class ToyJudge(ImageFeatureExtractor):
    """Images to rows of 3 * grid * grid numbers."""

    name = family = "toy"
    version = 1
    config_class = ToyConfig

    def __init__(self, grid: int) -> None:
        self.grid = grid

    @classmethod
    def from_setup(cls, setup: JudgeSetup) -> Self:
        return cls(setup.config.grid)

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "grid": self.grid}

    def features(self, images: Sequence[ByteArray]) -> FloatArray:
        return np.stack([self._mean_colors(image) for image in images])

    def _mean_colors(self, image: ByteArray) -> FloatArray:
        rows = [np.array_split(band, self.grid, axis=1) for band in np.array_split(image, self.grid)]
        return np.concatenate([cell.mean((0, 1)) for band in rows for cell in band]).astype(np.float32) / 255
