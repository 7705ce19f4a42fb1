"""EfficientNet-Lite0, the smallest of the family: EfficientNet-B0's widths and depths."""

from __future__ import annotations

from pipeline_steps.encoders.efficientnet_lite import EfficientNetLite


class EfficientNetLite0(EfficientNetLite):
    """4.6 M weights on squares of 224 pixels."""

    name = "efficientnet_lite0"
    version = 1
    files = ("efficientnet_lite0.safetensors", "imagenet_labels.txt")
    side = 224
    depths = (1, 2, 2, 3, 3, 4, 1)
    mean = 127.0
    scale = 1 / 128.0
