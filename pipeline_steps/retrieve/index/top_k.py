"""Top-k of many queries, exact or running over blocks of scores.

A running top-k sorts only the scores that exceed their query's k-th best so far, so a scan costs little more than its matrix
product.
"""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray


class RunningTopK:
    """Running top-k of `n_queries` queries over items that arrive in blocks.

    Of equal scores the first one stays, so a scan in ascending item order gives ties to the smaller item.
    """

    def __init__(self, n_queries: int, k: int) -> None:
        self._k = k
        self._width = k + max(64, k)  # space for new scores between two sorts
        self._scores = np.full((n_queries, self._width), -np.inf, np.float32)
        self._items = np.full((n_queries, self._width), -1, np.int64)
        self._filled = np.zeros(n_queries, np.int64)
        self._floor = np.full(n_queries, -np.inf, np.float32)

    def update(self, queries: IntArray, scores: FloatArray, items: IntArray) -> None:
        """Add scores [m, n] of `queries` [m] (each at most once) with `items` [n]."""
        n = scores.shape[1]
        floor = self._floor[queries]
        if n > self._width - self._k:
            crowded = np.isneginf(floor)
            if crowded.any():
                self._take_best(queries[crowded], scores[crowded], items)
                floor[crowded] = np.inf
        flat = np.flatnonzero(scores > floor[:, None])
        owner = flat // n
        counts = np.bincount(owner, minlength=len(queries))
        full = np.flatnonzero(self._filled[queries] + counts > self._width)
        if len(full):
            self._compact(queries[full])
            keep = scores.reshape(-1)[flat] > np.maximum(floor, self._floor[queries])[owner]
            counts = np.bincount(owner[keep], minlength=len(queries))
            full = np.flatnonzero(self._filled[queries] + counts > self._width)
            if len(full):
                self._take_best(queries[full], scores[full], items)
                keep &= ~np.isin(owner, full)
                counts[full] = 0
            flat, owner = flat[keep], owner[keep]
        starts = np.cumsum(counts) - counts
        query = queries[owner]
        slot = self._filled[query] + np.arange(len(flat)) - starts[owner]
        self._scores[query, slot] = scores.reshape(-1)[flat]
        self._items[query, slot] = items[flat - owner * n]
        self._filled[queries] += counts

    def result(self) -> tuple[IntArray, FloatArray]:
        """Items [n_queries, k] and their scores, best first; item -1 and score -inf where there are fewer items."""
        for start in range(0, len(self._filled), 16_384):
            self._compact(np.arange(start, min(start + 16_384, len(self._filled))))
        return self._items[:, : self._k].copy(), self._scores[:, : self._k].copy()

    def _take_best(self, queries: IntArray, scores: FloatArray, items: IntArray) -> None:
        """Add only the k best of a block, for queries that would add too many of it."""
        self._compact(queries)
        columns, values = top_k(scores, self._k)
        slot = self._filled[queries][:, None] + np.arange(columns.shape[1])
        self._scores[queries[:, None], slot] = values
        self._items[queries[:, None], slot] = items[columns]
        self._filled[queries] += columns.shape[1]
        self._compact(queries)

    def _compact(self, queries: IntArray) -> None:
        """Sort the scores of these queries and drop all but the k best."""
        scores, items = self._scores[queries], self._items[queries]
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self._k]
        best = np.take_along_axis(scores, order, 1)
        self._scores[queries, : self._k] = best
        self._items[queries, : self._k] = np.take_along_axis(items, order, 1)
        self._scores[queries, self._k :] = -np.inf
        self._items[queries, self._k :] = -1
        self._filled[queries] = np.minimum(self._filled[queries], self._k)
        self._floor[queries] = best[:, -1]


def top_k(scores: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Columns and values of the k largest of each row, largest first; ties go to the smaller column.

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
