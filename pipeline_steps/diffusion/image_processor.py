"""Image preprocessing: pad to a white square, resize, convert to a tensor in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pipeline_steps.core.array_types import ByteArray


def pad_to_square(image: ByteArray, size: int) -> ByteArray:
    """Center an image [H, W, 3] on a white square and resize it to uint8 [size, size, 3]. Nothing is cropped."""
    source = Image.fromarray(image)
    side = max(source.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(source, ((side - source.width) // 2, (side - source.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def place(canvas: ByteArray, image: ByteArray, side: float, left: float, top: float) -> None:
    """Draw an image on white into a canvas, in place; the darker pixel is kept where things overlap.

    Args:
        canvas, image: uint8 [size, size, 3].
        side: of the image, as a fraction of the canvas.
        left, top: position in [0, 1]; 0 is the left or upper edge, 1 the right or lower one.
    """
    size = len(canvas)
    pixels = max(4, round(side * size))
    small = np.asarray(Image.fromarray(image).resize((pixels, pixels), Image.Resampling.LANCZOS))
    x, y = round(left * (size - pixels)), round(top * (size - pixels))
    region = canvas[y : y + pixels, x : x + pixels]
    np.minimum(region, small, out=region)


def normalize_to_tensor(images: ByteArray) -> torch.Tensor:
    """Convert uint8 [N, H, W, 3] to float32 [N, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
