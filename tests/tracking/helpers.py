"""What the tests of tracking share: a stage's section, a small training, and a server whose answers can be spoilt."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from pipeline_steps import tracking
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Sqlite = Callable[[], "MlflowClient"]


class Config(StageConfig):
    """A stage's section."""

    learning_rate: float = 1e-3
    batch_size: int = 48
    api_key: str = ""


@dataclass
class Faults:
    """A proxy before an MLflow server. `spoil` spoils the next `times` answers (-1: all) to calls whose path holds `path`.

    Kinds: `refuse` (500, nothing done), `lose` (done, but answered with 500), `hang` (no answer for a minute).
    """

    upstream: str
    database: str
    uri: str = ""
    kind: str = ""
    times: int = 0
    path: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def spoil(self, kind: str, times: int = -1, path: str = "") -> None:
        self.kind, self.times, self.path = kind, times, path

    def client(self) -> MlflowClient:
        """A client of the server's database, past the proxy."""
        import mlflow

        return mlflow.MlflowClient(self.database, registry_uri=self.database)

    def hit(self, path: str) -> str:
        """Kind of fault that the next answer to `path` suffers."""
        if not self.kind or self.path not in path or self.times == 0:
            return ""
        self.times -= 1
        return self.kind

    def start(self) -> ThreadingHTTPServer:
        """Listen on a loopback port, in a thread."""
        faults = self

        class Proxy(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                kind = faults.hit(self.path)
                if kind == "hang":
                    faults.closing.wait(60)
                status, payload = 500, b"spoilt"
                if kind in {"", "lose"}:
                    request = urllib.request.Request(faults.upstream + self.path, body or None, method=self.command)
                    request.add_header("Content-Type", self.headers.get("Content-Type", "application/json"))
                    try:
                        with urllib.request.urlopen(request, timeout=30) as reply:
                            found = reply.status, reply.read()
                    except urllib.error.HTTPError as error:
                        found = error.code, error.read()
                    status, payload = found if kind == "" else (status, payload)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer  # noqa: N815 - http.server's own names

            def log_message(self, format: str, *args: object) -> None:
                """Stay quiet."""

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
        self.uri = f"http://127.0.0.1:{httpd.server_port}"
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        return httpd


def runs(client: MlflowClient, experiment: str = "seeing-sound") -> list[Run]:
    """All runs of an experiment, oldest first."""
    ids = [client.get_experiment_by_name(experiment).experiment_id]
    return list(client.search_runs(ids, order_by=["attributes.start_time ASC"]))


def only(client: MlflowClient) -> Run:
    """The one run of a store."""
    (run,) = runs(client)
    return run


def speak(
    layout: ProjectPaths, count: int = 20, first: int = 0, resume_key: str | None = "abc", config: Config | None = None
) -> None:
    """A small training: one number a step."""
    with tracking.run("train", layout, config or Config(), inputs=[layout.pairs], resume_key=resume_key) as tracker:
        for step in range(first, first + count):
            tracker.log_metrics({"train": {"loss": 1.0 / (step + 1)}}, step=step)
