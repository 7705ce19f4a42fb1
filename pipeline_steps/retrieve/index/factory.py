"""Which search a run uses: the rule behind `retrieve.search: auto`, and the making of each kind."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.retrieve.index.base import VectorIndex
from pipeline_steps.retrieve.index.exact import ExactIndex
from pipeline_steps.retrieve.index.ivf import IVFIndex
from pipeline_steps.retrieve.index.torch_exact import TorchExactIndex

log = logging.getLogger(__name__)

Kind = Literal["exact", "cluster", "gpu"]

SMALL_SCORES = 10**9
"""Texts x sounds below which the processor is exact within seconds; no other hardware is looked for, so outs agree anywhere."""

LARGE_SCORES = 2 * 10**9
"""Texts x sounds from which cells are used where there is no GPU: exact search takes half a minute on one core there."""


def resolve_backend(n_texts: int, n_sounds: int) -> Kind:
    """Exact on the processor below `SMALL_SCORES`; above, exact on a CUDA GPU if torch finds one; else exact below
    `LARGE_SCORES` and by cells from there on (which turns to exact itself where cells do not help)."""
    scores = n_texts * n_sounds
    if scores < SMALL_SCORES:
        return "exact"
    if cuda_found():
        return "gpu"
    return "exact" if scores < LARGE_SCORES else "cluster"


def cuda_found() -> bool:
    """Does torch see a CUDA device? Imports torch."""
    import torch

    return torch.cuda.is_available()


def build_index(
    kind: Kind, items: FloatArray, queries: FloatArray, target: float, sample: int, seed: int, block: int
) -> VectorIndex:
    """A search of `items` for `queries`; a seeded sample of the queries sets the probes of `cluster`."""
    if kind == "gpu":
        return TorchExactIndex(items)
    if kind == "exact":
        return ExactIndex(items, block)
    chosen = np.sort(seeded_rng(seed, "retrieve", "probes").permutation(len(queries))[:sample])
    search = IVFIndex(items, np.ascontiguousarray(queries[chosen]), target, seed, block)
    found = search.probing
    if found.probes:
        log.info(
            "%d items in %d cells, %d probed: recall@10 %.4f on %d queries, %.1f %% scored",
            len(items), found.cells, found.probes, found.recall, found.sample, 100 * found.scanned,
        )  # fmt: skip
    else:
        log.info("cells do not help among these %d items: the search is exact", len(items))
    return search
