"""Fixtures of the tracking tests: MLflow on SQLite, and an MLflow server behind a proxy that injects faults."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline_steps.core.project_paths import ProjectPaths
from tests.tracking.helpers import FaultyProxy

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProjectPaths:
    """Empty project in tracking mode `queue`."""
    monkeypatch.setenv("SONIFY_TRACKING", "queue")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    root = tmp_path / "project"
    (root / "data/pairs").mkdir(parents=True)
    (root / "data/pairs/pairs.txt").write_text("pairs")
    return ProjectPaths(root)


@pytest.fixture
def sqlite(layout: ProjectPaths, empty_database: Path) -> Callable[[], MlflowClient]:
    """Function that returns a client of the project's default store, an initialized database."""
    shutil.copy(empty_database, layout.root / "mlflow.db")

    def client() -> MlflowClient:
        import mlflow

        return mlflow.MlflowClient(f"sqlite:///{(layout.root / 'mlflow.db').resolve()}")

    return client


@pytest.fixture
def dead_port() -> int:
    """A loopback port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def plain_server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[tuple[str, str]]:
    """Address and database of an MLflow server."""
    folder = tmp_path_factory.mktemp("server")
    database = folder / "server.db"
    shutil.copy(empty_database, database)
    command = [
        sys.executable,
        str(Path(__file__).with_name("mlflow_server.py")),
        f"sqlite:///{database}",
        (folder / "artifacts").as_uri(),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield f"http://127.0.0.1:{port}", f"sqlite:///{database}"
        process.kill()


@pytest.fixture
def server(
    plain_server: tuple[str, str], layout: ProjectPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FaultyProxy]:
    """The server behind a faulty proxy, set as the project's store with an own experiment."""
    proxy = FaultyProxy(*plain_server)
    httpd = proxy.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    yield proxy
    proxy.closing.set()
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def clock() -> Callable[[], float]:
    """Seconds since the fixture was made."""
    started = time.monotonic()
    return lambda: time.monotonic() - started
