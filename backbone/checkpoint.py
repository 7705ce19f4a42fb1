"""Atomic checkpoints and reproducible random streams."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash at any time leaves either the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Return a checkpoint, or None when there is none."""
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def generator_of(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Return the CPU random generator of one step. It depends on nothing but its arguments, so a resumed run is exact."""
    words = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) & (2**63 - 1))
