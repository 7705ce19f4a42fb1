"""Vector index `torch`: exact search by matrix products on a torch device."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.errors import ResourceError
from pipeline_steps.retrieve.index.base import INDEXES, IndexSettings, VectorIndex

QUERY_BLOCK = 4096
ITEM_BLOCK = 131_072
"""Sizes of a block of scores: 4096 x 131072 float32, 2 GB."""


@INDEXES.register("torch")
class TorchExactIndex(VectorIndex):
    """Exact inner-product index in float32 (no TF32). The last bits differ from those of a CPU: another order of summation.

    Args:
        items: [N, D]; copied to the device block by block, so N is not limited by its memory.
        device: a torch device.

    Raises:
        ResourceError: `device` is a CUDA device and torch finds none.
    """

    indexes_texts = True

    def __init__(self, items: FloatArray, device: str = "cuda") -> None:
        import torch

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ResourceError("retrieve.index: torch needs a CUDA device, and torch finds no CUDA device", "set it to auto")
        self._items = items
        self._device = torch.device(device)

    @classmethod
    def build(cls, items: FloatArray, queries: FloatArray, config: Any, settings: IndexSettings) -> Self:
        return cls(items)

    @property
    def n_items(self) -> int:
        return len(self._items)

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See `VectorIndex.search`; equal scores are in the order of their rows, except at the k-th place."""
        import torch

        k = min(k, self.n_items)
        # The best scores of all queries stay on the device, so each block of items is copied once.
        scores = torch.full((len(queries), k), -torch.inf, device=self._device)
        rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=self._device)
        exact = torch.backends.cuda.matmul.fp32_precision if hasattr(torch.backends.cuda.matmul, "fp32_precision") else None
        if exact is not None:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            on_device = torch.from_numpy(np.array(queries, np.float32)).to(self._device)
            for at in range(0, self.n_items, ITEM_BLOCK):
                block = torch.from_numpy(np.array(self._items[at : at + ITEM_BLOCK], np.float32)).to(self._device).T
                for first in range(0, len(queries), QUERY_BLOCK):
                    part = slice(first, first + QUERY_BLOCK)
                    found, columns = (on_device[part] @ block).topk(min(k, block.shape[1]), dim=1)
                    found, columns = torch.cat([scores[part], found], 1), torch.cat([rows[part], columns + at], 1)
                    scores[part], chosen = found.topk(k, dim=1)
                    rows[part] = columns.gather(1, chosen)
        finally:
            if exact is not None:
                torch.backends.cuda.matmul.fp32_precision = exact
        found_rows, found_scores = rows.cpu().numpy(), scores.cpu().numpy()
        order = np.lexsort((found_rows, -found_scores), axis=1)
        return np.take_along_axis(found_rows, order, 1), np.take_along_axis(found_scores, order, 1)
