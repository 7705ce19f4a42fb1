"""Vector index `ivf`: k-means cells, of which each query probes the nearest.

Queries are grouped by cell, and each cell costs one matrix product for all the queries that probe it. Scores are exact; only
the choice of scored items is approximate, and its recall is measured. Each cell is read once per batch of queries, so this
index is faster than trees or graphs for many queries and slower for one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
from pydantic import Field

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.retrieve.index.base import INDEXES, IndexSettings, VectorIndex, recall_at
from pipeline_steps.retrieve.index.exact import BLOCK, ExactIndex
from pipeline_steps.retrieve.index.kmeans import KMeansCells, fit_cells
from pipeline_steps.retrieve.index.top_k import RunningTopK

log = logging.getLogger(__name__)

QUERY_BATCH = 65_536
"""Queries whose best scores are held at a time. The items are read once per batch."""

QUERY_BLOCK = 4096

MAX_SCANNED_FRACTION = 0.25
"""Fraction of scored items above which the index falls back to exact search, which costs about as much."""

MEASURED_K = 10


@dataclass(frozen=True, slots=True)
class ProbeSelection:
    """Number of probed cells, with the recall that a sample of queries reaches."""

    probes: int  # nearest cells scored per query; 0 means that all items are scored (exact search)
    recall: float  # recall@10 of the sample with these probes
    scanned: float  # mean fraction of the items that is scored for a query of the sample
    cells: int  # number of cells
    sample: int  # number of queries of the sample


class IVFIndexConfig(StageConfig):
    """Group `retrieve.ivf`."""

    min_recall: float = Field(0.97, gt=0, lt=1, description="recall@10 on a sample of texts that sets the number of probes")


@INDEXES.register("ivf")
class IVFIndex(VectorIndex):
    """Inverted-file index with the fewest probes that reach a measured recall; falls back to exact search.

    Args:
        items: unit rows [N, D]; may be memory-mapped.
        sample: queries [S, D] that are searched exactly to choose the number of probes.
        min_recall: recall@10 that the lower end of the sample's interval (two standard errors) must reach.
        seed: of k-means.
        query_batch_size: queries per matrix product of an exact search.
    """

    config_class = IVFIndexConfig
    indexes_texts = True

    def __init__(
        self, items: FloatArray, sample: FloatArray, min_recall: float, seed: int, query_batch_size: int = 1024
    ) -> None:
        self._items = items
        self._exact = ExactIndex(items, query_batch_size)
        self._cells = fit_cells(items, seed)
        truth = self._exact.search(sample, MEASURED_K)[0]
        probes, scanned = choose_probes(self._cells, sample, truth, min_recall)
        if scanned > MAX_SCANNED_FRACTION:
            self.probing = ProbeSelection(0, 1.0, 1.0, len(self._cells), len(sample))
            return
        self.probing = ProbeSelection(probes, 0.0, scanned, len(self._cells), len(sample))
        recall = recall_at(self.search(sample, MEASURED_K)[0], truth, MEASURED_K)
        self.probing = ProbeSelection(probes, recall, scanned, len(self._cells), len(sample))

    @classmethod
    def build(cls, items: FloatArray, queries: FloatArray, config: IVFIndexConfig, settings: IndexSettings) -> Self:
        """Index with the probes that a seeded sample of `queries` needs."""
        order = seeded_rng(settings.seed, "retrieve", "probes").permutation(len(queries))
        sample = np.ascontiguousarray(queries[np.sort(order[: settings.recall_sample_size])])
        index = cls(items, sample, config.min_recall, settings.seed, settings.query_batch_size)
        found = index.probing
        if found.probes:
            log.info(
                "%d items in %d cells, %d probed: recall@10 %.4f on %d queries, %.1f %% scored",
                len(items), found.cells, found.probes, found.recall, found.sample, 100 * found.scanned,
            )  # fmt: skip
        else:
            log.info("cells do not help among these %d items: the search is exact", len(items))
        return index

    def metrics(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self.probing).items()}

    @property
    def n_items(self) -> int:
        return len(self._items)

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
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
        # The nearest cell of every query is scored first: it sets a floor that few scores of the other cells exceed.
        for some in (probes[:, :1], probes[:, 1:]):
            for cell, members in _by_cell(some, len(self._cells)):
                inside = self._cells.order[self._cells.starts[cell] : self._cells.starts[cell + 1]]
                for at in range(0, len(inside), BLOCK):
                    chosen = inside[at : at + BLOCK]
                    vectors = self._items[chosen].T
                    for first in range(0, len(members), QUERY_BLOCK):
                        own = members[first : first + QUERY_BLOCK]
                        best.update(own, queries[own] @ vectors, chosen)
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


def choose_probes(cells: KMeansCells, sample: FloatArray, truth: IntArray, min_recall: float) -> tuple[int, float]:
    """Fewest probes with which the sample's recall exceeds `min_recall` by two standard errors, and the fraction then scored.

    A neighbor is found if its cell is probed, so the rank of its cell in the query's order of cells gives the recall for every
    number of probes at once.

    Args:
        truth: exact neighbors [S, k] of the sample [S, D].
    """
    if not len(sample):
        return len(cells), 1.0
    scores = sample @ cells.centroids.T
    order = np.argsort(-scores, axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(len(cells))[None, :], 1)
    ranks = np.take_along_axis(place, cells.cell_of[truth].astype(np.int64), 1)
    found = np.stack([np.bincount(row, minlength=len(cells)) for row in ranks]).cumsum(axis=1) / truth.shape[1]
    lower = found.mean(axis=0) - 2 * found.std(axis=0) / np.sqrt(len(sample))
    probes = int(np.argmax(lower >= min_recall)) + 1 if lower[-1] >= min_recall else len(cells)
    sizes = np.diff(cells.starts)
    scanned = float(sizes[order[:, :probes]].sum(axis=1).mean() / sizes.sum())
    return probes, scanned


def _by_cell(probes: IntArray, n_cells: int) -> Iterator[tuple[int, IntArray]]:
    """(cell, its queries in ascending order) for every cell that occurs in probes [Q, p]."""
    flat = probes.reshape(-1)
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], np.arange(n_cells + 1))
    for cell in np.flatnonzero(np.diff(bounds)).tolist():
        yield cell, order[bounds[cell] : bounds[cell + 1]] // probes.shape[1]
