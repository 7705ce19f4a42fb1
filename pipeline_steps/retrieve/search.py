"""Nearest neighbours by inner product: the protocol and the exact search."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

WHOLE_ITEMS = 4096
"""Items up to which one product scores them all; above, the scan goes block by block."""

FIRST_BLOCK, BLOCK = 1024, 8192
"""Items of the first and of the largest block of a scan: the first ones set a floor that few later scores pass."""


class NearestNeighbours(Protocol):
    """Items by inner product with queries."""

    @property
    def n_items(self) -> int:
        """How many items can be found."""
        ...

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """Rows [Q, k'] of the best items of each query [Q, D] and their scores, best first; k' = min(k, n_items)."""
        ...


def top_k(scores: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Columns and values of the k largest of each row, largest first; ties go to the smaller column, always.

    Args:
        scores: [Q, N], finite.
        k: at least 1; more than N gives N.
    """
    queries, items = scores.shape
    k = min(k, items)
    if not queries or not k:
        return np.zeros((queries, k), np.int64), np.zeros((queries, k), np.float32)
    threshold = np.partition(scores, items - k, axis=1)[:, items - k, None]
    above = scores > threshold
    tied = scores == threshold
    room = k - above.sum(axis=1, keepdims=True)
    chosen = above | (tied & (np.cumsum(tied, axis=1) <= room))
    columns = np.nonzero(chosen)[1].reshape(queries, k)
    values = np.take_along_axis(scores, columns, 1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1).astype(np.int64), np.take_along_axis(values, order, 1).astype(np.float32)


class ExactSearch:
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
        from pipeline_steps.retrieve.best import BestScores

        best, asked = BestScores(len(queries), k), np.arange(len(queries))
        at, size = 0, FIRST_BLOCK
        while at < self.n_items:
            end = min(at + size, self.n_items)
            best.offer(asked, np.asarray(queries @ self._items[at:end].T, np.float32), np.arange(at, end))
            at, size = end, min(2 * size, BLOCK)
        return best.result()


def recall_at(found: IntArray, exact: IntArray, k: int) -> float:
    """Share of the exact k nearest that `found` holds among its first k, averaged over queries."""
    k = min(k, exact.shape[1])
    if not len(exact) or not k:
        return 1.0
    hits = [len(set(a[:k].tolist()) & set(b[:k].tolist())) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(hits) / k)
