"""Seeded random generators."""

from __future__ import annotations

import random

import numpy as np


def seeded_rng(seed: int, *scope: str) -> np.random.Generator:
    """numpy generator of a seed and a named scope; independent of all other generators."""
    return np.random.default_rng([seed, *(int.from_bytes(name.encode(), "little") % 2**63 for name in scope)])


def seed_everything(seed: int) -> None:
    """Seed python, numpy and, if it is loaded, torch."""
    import sys

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
