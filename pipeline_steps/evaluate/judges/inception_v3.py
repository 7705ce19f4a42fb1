"""Judge `inception_v3`: the ImageNet network of torchvision and timm. Its Frechet distance is not FID."""

from __future__ import annotations

from typing import Any

from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES
from pipeline_steps.evaluate.judges.inception import FIDInceptionV3


@IMAGE_JUDGES.register("inception_v3")
class InceptionV3(FIDInceptionV3):
    """Images to 2048 pooled features of the network with 1000 classes, e.g. `timm/inception_v3.tv_in1k`."""

    name = "inception_v3"
    classes = 1000

    def _check(self, config: dict[str, Any]) -> None:
        super()._check(config)
        settings = config.get("pretrained_cfg") or {}
        self.mean = tuple(255.0 * float(value) for value in settings.get("mean", (0.5, 0.5, 0.5)))
        self.std = tuple(255.0 * float(value) for value in settings.get("std", (0.5, 0.5, 0.5)))
