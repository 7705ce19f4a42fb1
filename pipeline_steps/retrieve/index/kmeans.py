"""Spherical k-means over unit vectors: seeded, the same input gives the same bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.seeding import seeded_rng

ROUNDS = 6
TRAINING_ROWS = 40
"""Items per cell that k-means is fitted to."""

BLOCK = 16_384


@dataclass(frozen=True, slots=True)
class KMeansCells:
    """Items sorted by cell: those of cell c are `order[starts[c]:starts[c + 1]]`; `centroids` [L, D] are unit rows."""

    centroids: FloatArray
    order: IntArray
    starts: IntArray
    cell_of: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.centroids)


def cell_count(n_items: int) -> int:
    """Number of cells: the power of two nearest to twice the square root of the number of items.

    With more cells fewer items are scored for the same recall, but each query is compared with more centroids.
    """
    return min(n_items, int(2 ** round(1 + np.log2(max(n_items, 1)) / 2)))


def fit_cells(items: FloatArray, seed: int) -> KMeansCells:
    """Cells of items [N, D]: spherical k-means (Dhillon and Modha 2001) on a sample, then assignment of every item."""
    count = cell_count(len(items))
    random = seeded_rng(seed, "retrieve", "cells")
    chosen = np.sort(random.permutation(len(items))[: count * TRAINING_ROWS])
    sample = np.ascontiguousarray(items[chosen])
    centroids = np.ascontiguousarray(sample[np.sort(random.permutation(len(sample))[:count])])
    for _ in range(ROUNDS):
        centroids = _update(sample, centroids)
    cell_of = nearest_cell(items, centroids)[0].astype(np.int32)
    sizes = np.bincount(cell_of, minlength=count)
    return KMeansCells(centroids, np.argsort(cell_of, kind="stable"), np.r_[0, np.cumsum(sizes)], cell_of)


def nearest_cell(rows: FloatArray, centroids: FloatArray) -> tuple[IntArray, FloatArray]:
    """Centroid with the largest inner product for each row [N, D], and that product."""
    cell = np.empty(len(rows), np.int64)
    score = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK):
        products = rows[start : start + BLOCK] @ centroids.T
        cell[start : start + BLOCK] = products.argmax(axis=1)
        score[start : start + BLOCK] = products.max(axis=1)
    return cell, score


def _update(sample: FloatArray, centroids: FloatArray) -> FloatArray:
    """One iteration of Lloyd: unit means of the cells. An empty cell restarts at a row that is far from its own centroid."""
    cell, score = nearest_cell(sample, centroids)
    order = np.argsort(cell, kind="stable")
    sizes = np.bincount(cell, minlength=len(centroids))
    filled = np.flatnonzero(sizes)
    updated = np.empty_like(centroids)
    begins = np.cumsum(sizes)[filled] - sizes[filled]
    updated[filled] = np.add.reduceat(sample[order], begins, axis=0)
    empty = np.flatnonzero(sizes == 0)
    updated[empty] = sample[np.argsort(score, kind="stable")[: len(empty)]]
    norms = np.linalg.norm(updated, axis=1, keepdims=True)
    return np.asarray(np.divide(updated, norms, out=centroids.copy(), where=norms > 1e-12), np.float32)
