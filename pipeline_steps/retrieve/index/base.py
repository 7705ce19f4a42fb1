"""Protocol of a vector index, and recall of one index against another."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pipeline_steps.core.array_types import FloatArray, IntArray


class VectorIndex(Protocol):
    """Items by inner product with queries."""

    @property
    def n_items(self) -> int:
        """How many items can be found."""
        ...

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        """Rows [Q, k'] of the best items of each query [Q, D] and their scores, best first; k' = min(k, n_items)."""
        ...


def recall_at(found: IntArray, exact: IntArray, k: int) -> float:
    """Share of the exact k nearest that `found` holds among its first k, averaged over queries."""
    k = min(k, exact.shape[1])
    if not len(exact) or not k:
        return 1.0
    hits = [len(set(a[:k].tolist()) & set(b[:k].tolist())) for a, b in zip(found, exact, strict=True)]
    return float(np.mean(hits) / k)
