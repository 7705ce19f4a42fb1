"""Real MLflow on SQLite, and a real MLflow server whose answers can be spoilt."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from tracked import Faults

from pipeline_steps.core.layout import Layout

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised MLflow database without runs, made once for all test workers (its migrations take seconds)."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = shared / "empty-mlflow.db"
    with FileLock(shared / "empty-mlflow.lock"):
        if not path.exists():
            import mlflow

            making = shared / "making.db"
            client = mlflow.MlflowClient(f"sqlite:///{making}")
            client.search_experiments()
            making.rename(path)
    return path


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """An empty project, tracked into the spool alone until a test says otherwise."""
    monkeypatch.setenv("SONIFY_TRACKING", "spool")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_STAGE", raising=False)
    root = tmp_path / "project"
    (root / "data/pairs").mkdir(parents=True)
    (root / "data/pairs/pairs.txt").write_text("pairs")
    return Layout(root)


@pytest.fixture
def sqlite(layout: Layout, empty_database: Path) -> Callable[[], MlflowClient]:
    """The project's default store, ready to use; call it for a client."""
    shutil.copy(empty_database, layout.root / "mlflow.db")

    def client() -> MlflowClient:
        import mlflow

        return mlflow.MlflowClient(f"sqlite:///{(layout.root / 'mlflow.db').resolve()}")

    return client


@pytest.fixture
def dead_port() -> int:
    """A loopback port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """MLflow's own REST application on a loopback port, over SQLite, with faults on demand."""
    from werkzeug.serving import make_server

    database = tmp_path / "server.db"
    shutil.copy(empty_database, database)
    monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{database}")
    monkeypatch.setenv("_MLFLOW_SERVER_REGISTRY_STORE", f"sqlite:///{database}")
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", (tmp_path / "server-artifacts").as_uri())
    from mlflow.server import app, handlers

    monkeypatch.setattr(handlers, "_tracking_store", None)
    monkeypatch.setattr(handlers, "_model_registry_store", None)
    faults = Faults("", f"sqlite:///{database}")
    httpd = make_server("127.0.0.1", 0, faults.wrap(app.wsgi_app), threaded=True)
    faults.uri = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", faults.uri)
    yield faults
    faults.closing.set()
    httpd.shutdown()
    thread.join(5)


@pytest.fixture
def clock() -> Callable[[], float]:
    """Seconds since the fixture was made."""
    started = time.monotonic()
    return lambda: time.monotonic() - started


@pytest.fixture(scope="session")
def exported_model(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained model in the layout that the stage `train` exports."""
    import torch

    from pipeline_steps.diffusion.codec import PatchCodec
    from pipeline_steps.diffusion.conditioning import AudioConditioner
    from pipeline_steps.diffusion.denoiser import Denoiser, build_unet
    from pipeline_steps.diffusion.storage import save_model

    torch.manual_seed(0)
    conditioner = AudioConditioner(frames=4, frame_components=8, tag_components=8, width=32, layers=1, dropout=0.0)
    denoiser = Denoiser(build_unet(8, 4, (32, 32), 32, 16), conditioner, "latents")
    codec = PatchCodec(8, 0.5, 8)
    codec.fit(torch.rand(16, 3, 32, 32) * 2 - 1)
    target = tmp_path_factory.mktemp("model") / "audio2image"
    save_model(target, denoiser, codec, {"steps": 2, "guidance_scale": 2.0, "max_seconds": 2.0, "picture_size": 32}, assets)
    return target
