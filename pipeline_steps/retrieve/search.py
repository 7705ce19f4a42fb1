"""Nearest neighbours by inner product: the protocol and the exact search."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


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
    """Blocked matrix product and top-k: exact, deterministic, in memory of block x N scores."""

    def __init__(self, items: FloatArray, block: int = 1024) -> None:
        self._items = np.ascontiguousarray(items, np.float32)
        self._block = block

    @property
    def n_items(self) -> int:
        return len(self._items)

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See `NearestNeighbours.search`."""
        blocks = [
            top_k(np.asarray(queries[start : start + self._block] @ self._items.T, np.float32), k)
            for start in range(0, len(queries), self._block)
        ]
        if not blocks:
            return top_k(np.zeros((0, self.n_items), np.float32), k)
        return np.concatenate([rows for rows, _ in blocks]), np.concatenate([values for _, values in blocks])


def recall_at(found: IntArray, exact: IntArray, k: int) -> float:
    """Share of the exact k nearest that `found` holds among its first k, averaged over queries."""
    k = min(k, exact.shape[1])
    if not len(exact) or not k:
        return 1.0
    hits = [len(set(a[:k].tolist()) & set(b[:k].tolist())) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(hits) / k)
