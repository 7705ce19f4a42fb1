"""Pairs as a data set of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset


class TorchPairs(Dataset[dict[str, Any]]):
    """Items of a `PairDataset` with tensors: `image` uint8 [3, H, W], `audio` float32 [T]."""

    def __init__(self, pairs: Sequence[dict[str, Any]]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._pairs[index]
        image = torch.from_numpy(item["image"].copy()).permute(2, 0, 1)
        return {**item, "image": image, "audio": torch.from_numpy(item["audio"])}
