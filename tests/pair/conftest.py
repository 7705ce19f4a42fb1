"""Fixtures of the small world."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.pair.stage import PairConfig
from tests.pair.synthetic_tables import KINDS, World, config


@pytest.fixture
def empty_world(tmp_path: Path) -> World:
    return World(ProjectPaths(tmp_path))


@pytest.fixture
def world(empty_world: World) -> World:
    """120 pictures and 64 sounds of eight kinds, ten silent pictures, one true pair held out."""
    for seed in range(120):
        empty_world.add_picture(KINDS[seed % 8], seed)
    for seed in range(120, 130):
        empty_world.add_picture(None, seed)
    for seed in range(64):
        empty_world.add_sound(KINDS[seed % 8], seed)
    empty_world.add_picture("dog", 900, holdout=True)
    empty_world.add_sound("dog", 900, holdout=True)
    return empty_world


@pytest.fixture
def settings() -> Callable[..., PairConfig]:
    return config
