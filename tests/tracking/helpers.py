"""Helpers of the tracking tests: a configuration, a small training run, and a proxy that injects faults."""

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
    """Configuration of a stage."""

    learning_rate: float = 1e-3
    batch_size: int = 48
    api_key: str = ""


@dataclass
class FaultyProxy:
    """Proxy of an MLflow server. `inject` disturbs the next `times` responses (-1: all) to requests whose path contains `path`.

    Kinds: `refuse` (500, not forwarded), `lose` (forwarded, but answered with 500), `hang` (no response for a minute).
    """

    upstream: str
    database: str
    uri: str = ""
    kind: str = ""
    times: int = 0
    path: str = ""
    closing: threading.Event = field(default_factory=threading.Event)

    def inject(self, kind: str, times: int = -1, path: str = "") -> None:
        self.kind, self.times, self.path = kind, times, path

    def client(self) -> MlflowClient:
        """MLflow client of the server's database, bypassing the proxy."""
        import mlflow

        return mlflow.MlflowClient(self.database, registry_uri=self.database)

    def next_fault(self, path: str) -> str:
        """Kind of fault of the next response to `path`; empty if there is none."""
        if not self.kind or self.path not in path or self.times == 0:
            return ""
        self.times -= 1
        return self.kind

    def start(self) -> ThreadingHTTPServer:
        """Listen on a loopback port in a thread."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                kind = proxy.next_fault(self.path)
                if kind == "hang":
                    proxy.closing.wait(60)
                status, payload = 500, b"fault"
                if kind in {"", "lose"}:
                    request = urllib.request.Request(proxy.upstream + self.path, body or None, method=self.command)
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
                """Log nothing."""

        httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{httpd.server_port}"
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        return httpd


def runs(client: MlflowClient, experiment: str = "seeing-sound") -> list[Run]:
    """All runs of an experiment, oldest first."""
    ids = [client.get_experiment_by_name(experiment).experiment_id]
    return list(client.search_runs(ids, order_by=["attributes.start_time ASC"]))


def single_run(client: MlflowClient) -> Run:
    """The only run of a store."""
    (run,) = runs(client)
    return run


def run_training(
    layout: ProjectPaths, count: int = 20, first: int = 0, resume_key: str | None = "abc", config: Config | None = None
) -> None:
    """A small training run: one metric per step."""
    with tracking.run("train", layout, config or Config(), inputs=[layout.pairs], resume_key=resume_key) as tracker:
        for step in range(first, first + count):
            tracker.log_metrics({"train": {"loss": 1.0 / (step + 1)}}, step=step)
