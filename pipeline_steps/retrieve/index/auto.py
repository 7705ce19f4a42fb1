"""Choice of the index for `retrieve.index: auto`."""

from __future__ import annotations

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
