"""What the tests of tracking share: a stage's section, a small training, and a server whose answers can be spoilt."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline_steps import tracking
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.layout import Layout

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


def runs(client: MlflowClient) -> list[Run]:
    """All runs of a store, oldest first."""
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(ids, order_by=["attributes.start_time ASC"]))


def only(client: MlflowClient) -> Run:
    """The one run of a store."""
    (run,) = runs(client)
    return run


def speak(
    layout: Layout, count: int = 20, first: int = 0, resume_key: str | None = "abc", config: Config | None = None
) -> None:
    """A small training: one number a step."""
    with tracking.run("train", layout, config or Config(), inputs=[layout.pairs], resume_key=resume_key) as tracker:
        for step in range(first, first + count):
            tracker.log_metrics({"train": {"loss": 1.0 / (step + 1)}}, step=step)
