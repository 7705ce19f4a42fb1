"""Real MLflow on SQLite, and a real MLflow server whose answers can be spoilt."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.layout import Layout

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Config(StageConfig):
    """A stage's section."""

    learning_rate: float = 1e-3
    batch_size: int = 48
    api_key: str = ""


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


@dataclass
class Faults:
    """What goes wrong at the server. `answer` spoils the next `times` answers (-1: all) to calls whose path holds `path`.

    Kinds: `refuse` (500, nothing done), `lose` (done, but answered with 500), `hang` (no answer for a minute).
    """

    uri: str
    database: str
    kind: str = ""
    times: int = 0
    path: str = ""
    calls: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def spoil(self, kind: str, times: int = -1, path: str = "") -> None:
        self.kind, self.times, self.path = kind, times, path

    def heal(self) -> None:
        self.kind = ""

    def _hit(self, path: str) -> str:
        if not self.kind or self.path not in path or self.times == 0:
            return ""
        self.times -= 1
        return self.kind

    def wrap(self, application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        def spoilt(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            self.calls.append(environ["PATH_INFO"])
            kind = self._hit(environ["PATH_INFO"])
            if kind == "hang":
                self.closing.wait(60)
            if kind == "lose":
                b"".join(application(environ, lambda *_: lambda _: None))
            if kind:
                start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
                return [b"spoilt"]
            return application(environ, start_response)

        return spoilt


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
