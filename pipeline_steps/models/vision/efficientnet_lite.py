"""The EfficientNet-Lite networks: ImageNet-1k tags and pooled features (Google, Apache-2.0).

EfficientNet without squeeze-and-excitation, ReLU6 for swish, stem and head fixed.
Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.models.bundled_weights import BundledModel
from pipeline_steps.models.layers import conv2d_same
from pipeline_steps.models.vision.image_transforms import Framing, crop_or_pad_square, resize, to_chw

STRIDES = (1, 2, 2, 2, 1, 2, 1)
"""Stride of the first block of each stage; widths and kernels are those of the weights."""


class EfficientNetLite(BundledModel):
    """Image classifier and feature extractor; the sizes are in the subclasses.

    Args:
        framing: how an image becomes square; part of the fingerprint.
    """

    family = "efficientnet"

    side: ClassVar[int]
    """Side of the input, in pixels."""
    depths: ClassVar[tuple[int, ...]]
    """Blocks of each stage."""
    mean: ClassVar[float]
    scale: ClassVar[float]
    """The input is (byte - mean) * scale."""

    labels: list[str]
    """1000 ImageNet labels, synonyms separated by ", ", in class order."""

    def __init__(self, assets: Path, device: str = "cpu", framing: Framing = "crop") -> None:
        super().__init__(assets, device)
        self.framing = framing

    def describe(self) -> dict[str, object]:
        return {**super().describe(), "framing": self.framing}

    def _prepare(self, payloads: dict[str, bytes]) -> None:
        self.labels = payloads["imagenet_labels.txt"].decode("utf-8").split("\n")[:-1]

    def probabilities(self, images: Sequence[ByteArray]) -> FloatArray:
        """Class probabilities [N, 1000] of RGB images."""
        return self.tag(images)[0]

    def features(self, images: Sequence[ByteArray]) -> FloatArray:
        """Pooled features [N, 1280] of RGB images."""
        return self.tag(images)[1]

    @torch.inference_mode()
    def tag(self, images: Sequence[ByteArray]) -> tuple[FloatArray, FloatArray]:
        """Probabilities [N, 1000] and pooled features [N, 1280], one image at a time: bytes do not depend on the batch."""
        probabilities = np.zeros((len(images), 1000), np.float32)
        features = np.zeros((len(images), 1280), np.float32)
        for row, image in enumerate(images):
            square = resize(crop_or_pad_square(image, self.framing), self.side, self.side)
            inputs = torch.from_numpy(to_chw(square, self.mean, self.scale))[None].to(self.device)
            pooled, logits = self.forward(inputs)
            features[row] = pooled[0].cpu().numpy()
            probabilities[row] = torch.softmax(logits[0], 0).cpu().numpy()
        return probabilities, features

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled features [N, 1280] and logits [N, 1000] of normalized images [N, 3, side, side]; differentiable."""
        weights = self.weights
        hidden = F.relu6(conv2d_same(inputs, weights["stem.weight"], weights["stem.bias"], stride=2))
        index = 0
        for blocks, first_stride in zip(self.depths, STRIDES, strict=True):
            for position in range(blocks):
                hidden = self._block(hidden, f"blocks.{index}", first_stride if position == 0 else 1)
                index += 1
        hidden = F.relu6(F.conv2d(hidden, weights["head.weight"], weights["head.bias"]))
        pooled = hidden.mean((2, 3))
        return pooled, F.linear(pooled, weights["classifier.weight"], weights["classifier.bias"])

    def _block(self, inputs: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        """Inverted bottleneck: expand, depthwise, project, skip where shapes agree."""
        weights = self.weights
        hidden = inputs
        if f"{name}.expand.weight" in weights:
            hidden = F.relu6(F.conv2d(hidden, weights[f"{name}.expand.weight"], weights[f"{name}.expand.bias"]))
        depthwise = weights[f"{name}.depthwise.weight"]
        hidden = F.relu6(conv2d_same(hidden, depthwise, weights[f"{name}.depthwise.bias"], stride, hidden.shape[1]))
        hidden = F.conv2d(hidden, weights[f"{name}.project.weight"], weights[f"{name}.project.bias"])
        return hidden + inputs if hidden.shape == inputs.shape else hidden


class EfficientNetLite0(EfficientNetLite):
    """4.6 M weights on squares of 224 pixels."""

    name = "efficientnet_lite0"
    version = 1
    files = ("efficientnet_lite0.safetensors", "imagenet_labels.txt")
    side = 224
    depths = (1, 2, 2, 3, 3, 4, 1)
    mean = 127.0
    scale = 1 / 128.0


class EfficientNetLite3(EfficientNetLite):
    """8.2 M weights on squares of 280 pixels."""

    name = "efficientnet_lite3"
    version = 1
    files = ("efficientnet_lite3.safetensors", "imagenet_labels.txt")
    side = 280
    depths = (1, 3, 3, 5, 5, 6, 1)
    mean = 130.0
    scale = 0.012667336501181126  # with the mean: how the integer model reads its bytes
