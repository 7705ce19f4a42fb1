"""Exact search as matrix products on a torch device: on a GPU the fastest way at any size that is met here."""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.errors import ResourceError

QUERY_BLOCK = 4096
ITEM_BLOCK = 131_072
"""Scores held at a time: 4096 x 131072 float32, 2 GB."""


class TorchExactIndex:
    """Exact neighbours in float32 (no TF32). Last bits differ from the processor's: another order of summation.

    Args:
        items: [N, D]; they pass through the device block by block, so N is not bound by its memory.
        device: a torch device.

    Raises:
        ResourceError: a CUDA device is asked for and there is none.
    """

    def __init__(self, items: FloatArray, device: str = "cuda") -> None:
        import torch

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ResourceError("retrieve.search is gpu, and torch finds no CUDA device", "set retrieve.search to auto")
        self._items = items
        self._device = torch.device(device)

    @property
    def n_items(self) -> int:
        return len(self._items)

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See `NearestNeighbours.search`; equal scores come in the order of their rows, except at the k-th place."""
        import torch

        k = min(k, self.n_items)
        # Best scores of all queries stay on the device, so each block of items crosses the bus once.
        scores = torch.full((len(queries), k), -torch.inf, device=self._device)
        rows = torch.full((len(queries), k), -1, dtype=torch.int64, device=self._device)
        exact = torch.backends.cuda.matmul.fp32_precision if hasattr(torch.backends.cuda.matmul, "fp32_precision") else None
        if exact is not None:
            torch.backends.cuda.matmul.fp32_precision = "ieee"
        try:
            asked = torch.from_numpy(np.array(queries, np.float32)).to(self._device)
            for at in range(0, self.n_items, ITEM_BLOCK):
                block = torch.from_numpy(np.array(self._items[at : at + ITEM_BLOCK], np.float32)).to(self._device).T
                for first in range(0, len(queries), QUERY_BLOCK):
                    part = slice(first, first + QUERY_BLOCK)
                    found, columns = (asked[part] @ block).topk(min(k, block.shape[1]), dim=1)
                    found, columns = torch.cat([scores[part], found], 1), torch.cat([rows[part], columns + at], 1)
                    scores[part], chosen = found.topk(k, dim=1)
                    rows[part] = columns.gather(1, chosen)
        finally:
            if exact is not None:
                torch.backends.cuda.matmul.fp32_precision = exact
        found_rows, found_scores = rows.cpu().numpy(), scores.cpu().numpy()
        order = np.lexsort((found_rows, -found_scores), axis=1)
        return np.take_along_axis(found_rows, order, 1), np.take_along_axis(found_scores, order, 1)
