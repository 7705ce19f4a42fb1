"""Shared fixtures: isolation from the developer's services, real weights, tiny real data."""

from __future__ import annotations

import os
from pathlib import Path

# Before any heavy import: two pytest workers on two cores must not start four threads each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DO_NOT_TRACK"] = "1"
os.environ["DVC_NO_ANALYTICS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["PREFECT_API_URL"] = ""
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ["SONIFY_TRACKING"] = "off"  # tests of tracking switch it on

import hypothesis
import pytest
from filelock import FileLock

# A loaded machine is no defect: no deadline per example.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def project() -> Path:
    """Root of the repository."""
    return PROJECT


@pytest.fixture(scope="session")
def demo() -> Path:
    """The demo data set: images, sounds, manifest."""
    return PROJECT / "data/demo"


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real pretrained weights, fetched once (they are pinned by hash) and shared by all test workers."""
    from pipeline_steps.__main__ import run_stage
    from pipeline_steps.core.layout import Layout

    layout = Layout(PROJECT)
    with FileLock(PROJECT / ".cache-assets.lock"):
        if not (layout.assets / "meta.json").is_file():
            run_stage("assets", layout)
    return layout.assets
