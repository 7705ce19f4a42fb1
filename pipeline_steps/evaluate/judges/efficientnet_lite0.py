"""Judge `efficientnet_lite0`: pooled features of EfficientNet-Lite0. Captioner `tagger` uses the same family."""

from __future__ import annotations

from typing import Self

from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES, ImageFeatureExtractor, JudgeSetup
from pipeline_steps.models.vision.efficientnet_lite import EfficientNetLite0


@IMAGE_JUDGES.register("efficientnet_lite0")
class EfficientNetLite0Judge(EfficientNetLite0, ImageFeatureExtractor):
    """Images to rows of 1280 numbers."""

    @classmethod
    def from_setup(cls, setup: JudgeSetup) -> Self:
        """Weights of the stage `assets`."""
        return cls(setup.assets)
