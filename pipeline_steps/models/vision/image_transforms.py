"""Framing and resizing of input images with Pillow, without torchvision or OpenCV."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline_steps.core.array_types import ByteArray, FloatArray

Framing = Literal["crop", "pad", "stretch"]
"""crop: central square; pad: whole image on a white square; stretch: whole image, aspect ratio changed."""


def crop_or_pad_square(image: ByteArray, framing: Framing) -> ByteArray:
    """Crop or pad an image to a square; `stretch` returns it unchanged."""
    height, width = image.shape[:2]
    if framing == "stretch" or height == width:
        return image
    if framing == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return image[top : top + side, left : left + side]
    side = max(height, width)
    canvas: npt.NDArray[np.uint8] = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = image
    return canvas


def resize(image: ByteArray, width: int, height: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> ByteArray:
    """Resize RGB uint8 [H, W, 3] to [height, width, 3] with Pillow's antialiasing filters."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


def to_chw(image: ByteArray, mean: npt.ArrayLike, scale: npt.ArrayLike) -> FloatArray:
    """(x - mean) * scale as float32 [3, H, W]."""
    normalised = (image.astype(np.float32) - np.asarray(mean, np.float32)) * np.asarray(scale, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))
