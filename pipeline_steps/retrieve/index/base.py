"""Vector indexes: base class, registry, choice for `retrieve.index: auto`, and recall of one index against another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.registry import Registry


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """Settings of the stage that apply to every index."""

    seed: int = 0  # of everything random
    query_batch_size: int = 1024  # queries per matrix product
    recall_sample_size: int = 500  # largest number of queries on which an index measures its recall


class VectorIndex(ABC):
    """Index of unit rows that is searched by inner product.

    Attributes:
        config_class: model of the configuration group; None for an index without parameters.
        indexes_texts: whether CSLS uses an index of this kind over the texts too; otherwise it searches them exactly.
    """

    config_class: ClassVar[type[StageConfig] | None] = None
    indexes_texts: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def build(cls, items: FloatArray, queries: FloatArray, config: Any, settings: IndexSettings) -> Self:
        """Index of `items` [N, D] for queries like `queries` [Q, D].

        Args:
            items: unit rows; may be memory-mapped.
            queries: the queries that will be searched, for an index that adapts to them.
            config: the index's configuration group, an instance of `config_class`.
            settings: settings of the stage.
        """

    @property
    @abstractmethod
    def n_items(self) -> int:
        """Number of items."""

    @abstractmethod
    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """Rows [Q, k'] of the best items of each query [Q, D] and their scores, best first; k' = min(k, n_items).

        Row -1 with score -inf fills the places of a query for which fewer items are found.
        """

    def metrics(self) -> dict[str, float]:
        """Figures about the index for the report."""
        return {}


INDEXES: Registry[type[VectorIndex]] = Registry("vector index", "pipeline_steps.retrieve.index")


def recall_at(found: IntArray, exact: IntArray, k: int) -> float:
    """Fraction of the exact k nearest that are among the first k of `found`, averaged over queries."""
    k = min(k, exact.shape[1])
    if not len(exact) or not k:
        return 1.0
    hits = [len(set(a[:k].tolist()) & set(b[:k].tolist())) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(hits) / k)


SMALL_SCORES = 10**9
"""Texts x clips below which exact search on the CPU takes seconds. No GPU is looked for, so outputs agree on all machines."""

LARGE_SCORES = 2 * 10**9
"""Texts x clips from which `ivf` is used on machines without a GPU: exact search takes half a minute on one core there."""


def resolve_index(n_texts: int, n_clips: int) -> str:
    """Registered name of the index for a pool of this size.

    `exact` below `SMALL_SCORES`; above, `torch` if there is a CUDA GPU; else `exact` below `LARGE_SCORES` and `ivf` from there
    on. `ivf` falls back to exact search where clusters do not help.
    """
    scores = n_texts * n_clips
    if scores < SMALL_SCORES:
        return "exact"
    if cuda_found():
        return "torch"
    return "exact" if scores < LARGE_SCORES else "ivf"


def cuda_found() -> bool:
    """Whether torch finds a CUDA device. Imports torch."""
    import torch

    return torch.cuda.is_available()
