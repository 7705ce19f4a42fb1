"""Pictures as the model sees them: square, on white, small."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pipeline_steps.core.array_types import ByteArray


def pad_to_square(picture: ByteArray, size: int) -> ByteArray:
    """The whole picture [H, W, 3], centred on a white square and resampled to uint8 [size, size, 3]. Nothing is cropped."""
    image = Image.fromarray(picture)
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def normalize_to_tensor(pictures: ByteArray) -> torch.Tensor:
    """float32 [N, 3, H, W] in [-1, 1] of uint8 [N, H, W, 3]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
