"""Nearest neighbours by inner product: the protocol and the exact search."""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.retrieve.index.top_k import top_k

WHOLE_ITEMS = 4096
"""Items up to which one product scores them all; above, the scan goes block by block."""

FIRST_BLOCK, BLOCK = 1024, 8192
"""Items of the first and of the largest block of a scan: the first ones set a floor that few later scores pass."""


class ExactIndex:
    """Blocked matrix product and top-k: exact, deterministic, ties to the smaller row.

    Memory is block x min(N, 8192) scores, whatever N; the items may be memory-mapped and are read once per block of queries.
    """

    def __init__(self, items: FloatArray, block: int = 1024) -> None:
        self._items = np.ascontiguousarray(items, np.float32)
        self._block = block

    @property
    def n_items(self) -> int:
        return len(self._items)

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See `NearestNeighbours.search`."""
        k = min(k, self.n_items)
        rows = np.zeros((len(queries), k), np.int64)
        scores = np.zeros((len(queries), k), np.float32)
        scan = self._whole if self.n_items <= max(WHOLE_ITEMS, k) else self._scan
        for start in range(0, len(queries), self._block):
            part = slice(start, start + self._block)
            rows[part], scores[part] = scan(queries[part], k)
        return rows, scores

    def _whole(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        return top_k(np.asarray(queries @ self._items.T, np.float32), k)

    def _scan(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        from pipeline_steps.retrieve.index.top_k import RunningTopK

        best, asked = RunningTopK(len(queries), k), np.arange(len(queries))
        at, size = 0, FIRST_BLOCK
        while at < self.n_items:
            end = min(at + size, self.n_items)
            best.offer(asked, np.asarray(queries @ self._items[at:end].T, np.float32), np.arange(at, end))
            at, size = end, min(2 * size, BLOCK)
        return best.result()
