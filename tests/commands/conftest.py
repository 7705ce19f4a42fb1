"""Fixtures of the command tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.factories.cli_project import ids, pool, sonify
from tests.factories.exported_adapter import export_adapter
from tests.factories.page_project import build_page_project
from tests.tracking.conftest import layout, sqlite

__all__ = ["ids", "layout", "pool", "sonify", "sqlite"]


@pytest.fixture(scope="session")
def exported_adapter(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported audio adapter of a tiny backbone with a text encoder."""
    return export_adapter(tmp_path_factory.mktemp("adapter"), assets)


@pytest.fixture(scope="session")
def page_project(assets: Path, exported_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Project with a small model, a small pool and its embeddings; read-only for tests."""
    return build_page_project(tmp_path_factory.mktemp("page") / "project", assets, exported_adapter)
