"""EfficientNet-Lite3: 1.2 times the widths of Lite0, 1.4 times its depths, larger pictures.

The weights come from Google's model for 8-bit integers. Weights are read back as real numbers and activations are not
rounded, so the outputs differ a little from those of the integer model.
"""

from __future__ import annotations

from pipeline_steps.encoders.efficientnet_lite import EfficientNetLite


class EfficientNetLite3(EfficientNetLite):
    """8.2 M weights on squares of 280 pixels."""

    name = "efficientnet_lite3"
    version = 1
    files = ("efficientnet_lite3.safetensors", "imagenet_labels.txt")
    side = 280
    depths = (1, 3, 3, 5, 5, 6, 1)
    mean = 130.0
    scale = 0.012667336501181126  # with the mean: how the integer model reads its bytes
