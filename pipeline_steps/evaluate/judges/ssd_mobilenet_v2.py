"""Judge `ssd_mobilenet_v2`: pooled features of an SSD-MobileNet-v2 detector."""

from __future__ import annotations

from typing import Self

from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES, ImageFeatureExtractor, JudgeSetup
from pipeline_steps.models.vision.ssd_mobilenet_v2 import SsdMobileNetV2


@IMAGE_JUDGES.register("ssd_mobilenet_v2")
class SsdMobileNetV2Judge(SsdMobileNetV2, ImageFeatureExtractor):
    """Images to rows of 960 numbers."""

    @classmethod
    def from_setup(cls, setup: JudgeSetup) -> Self:
        """Weights of the stage `assets`."""
        return cls(setup.assets)
