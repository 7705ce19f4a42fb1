"""Judge `augnet`: image similarity embedding (Chen 2021, MIT; https://github.com/chenmingxiang110/AugNet).

A ResNet-50 trained without labels to recognize augmented copies of an image. `imgsim` 0.1.2, the published wrapper, reverses
the channels of images that OpenCV read as BGR; the network therefore expects RGB, which this class passes on unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES, ImageFeatureExtractor, JudgeSetup
from pipeline_steps.models.bundled_weights import BundledModel
from pipeline_steps.models.vision.image_transforms import resize, to_chw

SHORT_SIDE = 350
JUDGE_SHORT_SIDE = 128
"""px; generated images are small, and a larger input costs time without adding detail."""
MEAN = np.array([0.485, 0.456, 0.406], np.float32) * 255
SCALE = np.array([1 / 0.229, 1 / 0.224, 1 / 0.225], np.float32) / 255
BLOCKS = (3, 4, 6, 3)


@IMAGE_JUDGES.register("augnet")
class AugNet(BundledModel, ImageFeatureExtractor):
    """Images to rows of 768 numbers in [-1, 1].

    Args:
        short_side: px to which the shorter side of an image is resized.
    """

    name = "augnet"
    family = "augnet"
    version = 1
    files = ("augnet.safetensors",)

    def __init__(self, assets: Path, device: str = "cpu", short_side: int = SHORT_SIDE) -> None:
        super().__init__(assets, device)
        self.short_side = short_side

    @classmethod
    def from_setup(cls, setup: JudgeSetup) -> Self:
        """Weights of the stage `assets`, at the resolution of generated images."""
        return cls(setup.assets, short_side=JUDGE_SHORT_SIDE)

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "short_side": self.short_side}

    @torch.inference_mode()
    def features(self, images: Sequence[ByteArray]) -> FloatArray:
        """Rows [N, 768] of RGB images, one at a time because their sizes may differ."""
        rows = np.zeros((len(images), 768), np.float32)
        for row, image in enumerate(images):
            height, width = image.shape[:2]
            scale = self.short_side / min(height, width)
            small = resize(image, round(width * scale), round(height * scale), Image.Resampling.BILINEAR)
            rows[row] = self.forward(torch.from_numpy(to_chw(small, MEAN, SCALE))[None].to(self.device))[0].cpu().numpy()
        return rows

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features [N, 768] of normalized images [N, 3, H, W]."""
        hidden = F.relu(self._conv(inputs, "stem", stride=2))
        hidden = F.max_pool2d(hidden, 3, 2, 1)
        for stage, blocks in enumerate(BLOCKS, start=1):
            for block in range(blocks):
                hidden = self._bottleneck(hidden, f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1)
        return torch.tanh(F.linear(hidden.mean((2, 3)), self.weights["head.weight"], self.weights["head.bias"]))

    def _bottleneck(self, inputs: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        hidden = F.relu(self._conv(inputs, f"{name}.1"))
        hidden = F.relu(self._conv(hidden, f"{name}.2", stride))
        hidden = self._conv(hidden, f"{name}.3")
        skip = self._conv(inputs, f"{name}.skip", stride) if f"{name}.skip.weight" in self.weights else inputs
        return F.relu(hidden + skip)

    def _conv(self, inputs: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(inputs, weight, self.weights[f"{name}.bias"], stride=stride, padding=weight.shape[-1] // 2)
