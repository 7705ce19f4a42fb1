"""Vector index `exact`: blocked matrix products on the CPU."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.retrieve.index.base import INDEXES, IndexSettings, VectorIndex
from pipeline_steps.retrieve.index.top_k import RunningTopK, top_k

WHOLE_ITEMS = 4096
"""Largest number of items that one matrix product scores; more items are scanned block by block."""

FIRST_BLOCK, BLOCK = 1024, 8192
"""Items of the first and of the largest block of a scan. The first block sets a floor that few later scores exceed."""


@INDEXES.register("exact")
class ExactIndex(VectorIndex):
    """Exact inner-product index: deterministic, ties go to the smaller row.

    Memory is query_batch_size x min(N, 8192) scores. The items may be memory-mapped and are read once per batch of queries.
    """

    def __init__(self, items: FloatArray, query_batch_size: int = 1024) -> None:
        self._items = np.ascontiguousarray(items, np.float32)
        self._query_batch_size = query_batch_size

    @classmethod
    def build(cls, items: FloatArray, queries: FloatArray, config: Any, settings: IndexSettings) -> Self:
        return cls(items, settings.query_batch_size)

    @property
    def n_items(self) -> int:
        return len(self._items)

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        k = min(k, self.n_items)
        rows = np.zeros((len(queries), k), np.int64)
        scores = np.zeros((len(queries), k), np.float32)
        scan = self._whole if self.n_items <= max(WHOLE_ITEMS, k) else self._scan
        for start in range(0, len(queries), self._query_batch_size):
            part = slice(start, start + self._query_batch_size)
            rows[part], scores[part] = scan(queries[part], k)
        return rows, scores

    def _whole(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        return top_k(np.asarray(queries @ self._items.T, np.float32), k)

    def _scan(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        best, query_rows = RunningTopK(len(queries), k), np.arange(len(queries))
        at, size = 0, FIRST_BLOCK
        while at < self.n_items:
            end = min(at + size, self.n_items)
            best.update(query_rows, np.asarray(queries @ self._items[at:end].T, np.float32), np.arange(at, end))
            at, size = end, min(2 * size, BLOCK)
        return best.result()
