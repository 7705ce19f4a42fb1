"""Seeded random generators."""

from __future__ import annotations

import numpy as np


def seeded_rng(seed: int, *scope: str) -> np.random.Generator:
    """numpy generator of a seed and a named scope; independent of all other generators."""
    return np.random.default_rng([seed, *(int.from_bytes(name.encode(), "little") % 2**63 for name in scope)])
