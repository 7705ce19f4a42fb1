"""Where a person sees a tracked run: addresses in MLflow's pages of the runs of one flow run, and of models by content."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.settings import read_settings, redact

if TYPE_CHECKING:
    from pipeline_steps.tracking.client.mlflow_client import MlflowStore

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `sonify ui` shows the default store."""


@dataclass(frozen=True, slots=True)
class RunLink:
    """One MLflow run: the stage that made it, its name there, its state, its page."""

    stage: str
    name: str
    status: str
    url: str


def runs_for_flow(layout: ProjectPaths, flow_run_id: str) -> list[RunLink]:
    """Runs that the stages of one flow run opened (they carry its id), in the order of their start.

    Raises:
        OutageError: the store does not answer.
    """
    store = _store(layout)
    query = f"tags.flow_run_id = '{flow_run_id}'"
    found = store.call(lambda: store.client.search_runs([store.experiment_id()], query, order_by=["attributes.start_time ASC"]))
    return [
        RunLink(
            run.data.tags.get("dvc.stage", ""),
            run.info.run_name,
            run.info.status,
            _page(layout, run.info.experiment_id, run.info.run_id),
        )
        for run in found
    ]


def runs_for_outputs(layout: ProjectPaths, digests: Iterable[str]) -> list[RunLink]:
    """Runs that once made a model with one of these DVC md5s: what a restored out goes back to.

    Raises:
        OutageError: the store does not answer.
    """
    from pipeline_steps.tracking.client.model_logging import find_model

    store = _store(layout)
    found = []
    for digest in digests:
        model = find_model(store, digest)
        if model is not None and model.source_run_id:
            run_id = model.source_run_id
            run = store.call(lambda run_id=run_id: store.client.get_run(run_id))  # type: ignore[misc]
            page = _page(layout, run.info.experiment_id, run_id)
            found.append(RunLink(run.data.tags.get("dvc.stage", ""), run.info.run_name, run.info.status, page))
    return found


def _store(layout: ProjectPaths) -> MlflowStore:
    from pipeline_steps.tracking.client.mlflow_client import MlflowStore

    return MlflowStore(read_settings(layout), timeout_s=10)


def _page(layout: ProjectPaths, experiment: str, run: str) -> str:
    settings = read_settings(layout)
    base = redact(settings.uri).rstrip("/") if settings.is_server else LOCAL_UI
    return f"{base}/#/experiments/{experiment}/runs/{run}"
