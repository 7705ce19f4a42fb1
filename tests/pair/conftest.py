"""Fixtures of the synthetic data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.pair.stage import PairConfig
from tests.pair.synthetic_tables import KINDS, SyntheticDataset, config


@pytest.fixture
def empty_dataset(tmp_path: Path) -> SyntheticDataset:
    return SyntheticDataset(ProjectPaths(tmp_path))


@pytest.fixture
def dataset(empty_dataset: SyntheticDataset) -> SyntheticDataset:
    """120 images and 64 clips of eight kinds, ten images without events, one held-out pair."""
    for seed in range(120):
        empty_dataset.add_image(KINDS[seed % 8], seed)
    for seed in range(120, 130):
        empty_dataset.add_image(None, seed)
    for seed in range(64):
        empty_dataset.add_audio(KINDS[seed % 8], seed)
    empty_dataset.add_image("dog", 900, holdout=True)
    empty_dataset.add_audio("dog", 900, holdout=True)
    return empty_dataset


@pytest.fixture
def settings() -> Callable[..., PairConfig]:
    return config
