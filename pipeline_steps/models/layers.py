"""Convolutions with the padding of TensorFlow, with which the bundled networks were trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME rule along one axis: output ceil(size / stride); an odd pixel is added at the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def conv2d_same(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: int = 1, groups: int = 1
) -> torch.Tensor:
    """2-D convolution with SAME padding.

    Args:
        inputs: [N, C, H, W].
        weight: [out, C / groups, k, k].
        bias: [out].

    Returns:
        [N, out, ceil(H / stride), ceil(W / stride)].
    """
    kernel = weight.shape[-1]
    top, bottom = same_padding(inputs.shape[2], kernel, stride)
    left, right = same_padding(inputs.shape[3], kernel, stride)
    if (top, left) == (bottom, right):
        return F.conv2d(inputs, weight, bias, stride=stride, padding=(top, left), groups=groups)
    return F.conv2d(F.pad(inputs, (left, right, top, bottom)), weight, bias, stride=stride, groups=groups)
