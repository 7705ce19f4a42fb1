"""Batched search through cells: queries are turned into lists per cell, and each cell costs one matrix product for all the
queries that probe it. Scores are exact; only which items are scored is a choice, and that choice is measured.

A tree or a graph answers one query at a time and waits for memory; this reads each cell once and computes at the speed of
the matrix product, which is why it wins for millions of queries and not for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.retrieve.index.base import recall_at
from pipeline_steps.retrieve.index.exact import BLOCK, ExactIndex
from pipeline_steps.retrieve.index.kmeans import KMeansCells, fit_cells
from pipeline_steps.retrieve.index.top_k import RunningTopK

QUERY_BATCH = 65_536
"""Queries whose best scores are held at a time; the items are read once for each such batch."""

QUERY_BLOCK = 4096

EXACT_SHARE = 0.25
"""Share of all items above which scoring cell by cell is given up for the plain scan: it would cost about as much."""

MEASURED_K = 10


@dataclass(frozen=True, slots=True)
class ProbeSelection:
    """How cells are probed, and what a sample of queries says of it.

    Attributes:
        probes: nearest cells scored per query; 0 means all items are scored (exact search).
        recall: recall@10 of the sample with these probes.
        scanned: share of the items that is scored for a query of the sample, on average.
        cells, sample: how many of each.
    """

    probes: int
    recall: float
    scanned: float
    cells: int
    sample: int


class IVFIndex:
    """Neighbours through k-means cells, with as few probes as reach a measured recall; else it falls back to exact search.

    Args:
        items: unit rows [N, D]; may be memory-mapped.
        sample: queries [S, D] that are answered exactly to choose the probes.
        target: recall@10 that the lower end of the sample's interval (two standard errors) must reach.
        seed: of k-means.
        block: queries per product where search is exact.
    """

    def __init__(self, items: FloatArray, sample: FloatArray, target: float, seed: int, block: int = 1024) -> None:
        self._items = items
        self._exact = ExactIndex(items, block)
        self._cells = fit_cells(items, seed)
        truth = self._exact.search(sample, MEASURED_K)[0]
        probes, scanned = choose_probes(self._cells, sample, truth, target)
        if scanned > EXACT_SHARE:
            self.probing = ProbeSelection(0, 1.0, 1.0, len(self._cells), len(sample))
            return
        self.probing = ProbeSelection(probes, 0.0, scanned, len(self._cells), len(sample))
        recall = recall_at(self.search(sample, MEASURED_K)[0], truth, MEASURED_K)
        self.probing = ProbeSelection(probes, recall, scanned, len(self._cells), len(sample))

    @property
    def n_items(self) -> int:
        return len(self._items)

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """See `NearestNeighbours.search`; where the probed cells hold fewer than k items, row -1 and score -inf fill up."""
        if not self.probing.probes:
            return self._exact.search(queries, k)
        k = min(k, self.n_items)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for start in range(0, len(queries), QUERY_BATCH):
            part = slice(start, start + QUERY_BATCH)
            rows[part], scores[part] = self._batch(np.asarray(queries[part]), k)
        return rows, scores

    def _batch(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        best = RunningTopK(len(queries), k)
        probes = probed_cells(self._cells, queries, self.probing.probes)
        # The nearest cell of every query first: it sets a floor that few scores of the other cells pass.
        for some in (probes[:, :1], probes[:, 1:]):
            for cell, asking in _by_cell(some, len(self._cells)):
                inside = self._cells.order[self._cells.starts[cell] : self._cells.starts[cell + 1]]
                for at in range(0, len(inside), BLOCK):
                    chosen = inside[at : at + BLOCK]
                    vectors = self._items[chosen].T
                    for first in range(0, len(asking), QUERY_BLOCK):
                        own = asking[first : first + QUERY_BLOCK]
                        best.offer(own, queries[own] @ vectors, chosen)
        rows, scores = best.result()
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


def probed_cells(cells: KMeansCells, queries: FloatArray, probes: int) -> IntArray:
    """The `probes` cells [Q, probes] with the nearest centroids of each query, nearest first."""
    found = np.empty((len(queries), probes), np.int64)
    for start in range(0, len(queries), BLOCK):
        scores = queries[start : start + BLOCK] @ cells.centroids.T
        near = np.argpartition(-scores, probes - 1, axis=1)[:, :probes]
        order = np.lexsort((near, -np.take_along_axis(scores, near, 1)), axis=1)
        found[start : start + BLOCK] = np.take_along_axis(near, order, 1)
    return found


def choose_probes(cells: KMeansCells, sample: FloatArray, truth: IntArray, target: float) -> tuple[int, float]:
    """The fewest probes with which the sample's recall reaches `target` by two standard errors, and the share then scored.

    A neighbour is found as soon as its cell is probed, so the place of its cell in the query's order of cells gives the recall
    of every number of probes at once.

    Args:
        truth: exact neighbours [S, k] of the sample [S, D].
    """
    if not len(sample):
        return len(cells), 1.0
    scores = sample @ cells.centroids.T
    order = np.argsort(-scores, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(len(cells))[None, :], 1)
    wanted = np.take_along_axis(place, cells.cell_of[truth].astype(np.int64), 1)
    found = np.stack([np.bincount(row, minlength=len(cells)) for row in wanted]).cumsum(axis=1) / truth.shape[1]
    lower = found.mean(axis=0) - 2 * found.std(axis=0) / np.sqrt(len(sample))
    probes = int(np.argmax(lower >= target)) + 1 if lower[-1] >= target else len(cells)
    sizes = np.diff(cells.starts)
    scanned = float(sizes[order[:, :probes]].sum(axis=1).mean() / sizes.sum())
    return probes, scanned


def _by_cell(probes: IntArray, n_cells: int) -> Iterator[tuple[int, IntArray]]:
    """(cell, its queries in rising order) of every cell that occurs in probes [Q, p]."""
    flat = probes.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(n_cells + 1))
    for cell in np.flatnonzero(np.diff(bounds)).tolist():
        yield cell, order[bounds[cell] : bounds[cell + 1]] // probes.shape[1]
