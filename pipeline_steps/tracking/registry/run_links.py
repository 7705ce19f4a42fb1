"""Links to MLflow runs: the runs of one flow run, and the runs that made given models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.mlflow_client import MlflowStore
from pipeline_steps.tracking.client.model_logging import find_model
from pipeline_steps.tracking.settings import TrackingSettings, read_settings, redact

if TYPE_CHECKING:
    from mlflow.entities import Run

LOCAL_UI = "http://127.0.0.1:5000"
"""Address at which `sonify ui` shows the default store."""


@dataclass(frozen=True, slots=True)
class RunLink:
    """Stage, name, status and page of an MLflow run."""

    stage: str
    name: str
    status: str
    url: str


def runs_for_flow(layout: ProjectPaths, flow_run_id: str) -> list[RunLink]:
    """MLflow runs of the stages of a flow run, in the order of their start.

    Raises:
        StoreUnavailableError: the store does not answer.
    """
    store = _store(layout)
    query = f"tags.flow_run_id = '{flow_run_id}'"
    order = ["attributes.start_time ASC"]
    found = store.call(store.client.search_runs, [store.experiment_id()], query, order_by=order)
    return [_link(store.settings, run) for run in found]


def runs_for_outputs(layout: ProjectPaths, digests: Iterable[str]) -> list[RunLink]:
    """MLflow runs that made the models with these DVC md5s; outs that are no models are skipped.

    Raises:
        StoreUnavailableError: the store does not answer.
    """
    store = _store(layout)
    run_ids = [model.source_run_id for digest in digests if (model := find_model(store, digest)) is not None]
    runs = [store.call(store.client.get_run, run_id) for run_id in run_ids if run_id]
    return [_link(store.settings, run) for run in runs]


def _store(layout: ProjectPaths) -> MlflowStore:
    return MlflowStore(read_settings(layout), timeout_s=10)


def _link(settings: TrackingSettings, run: Run) -> RunLink:
    base = redact(settings.uri).rstrip("/") if settings.is_server else LOCAL_UI
    url = f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return RunLink(run.data.tags.get("dvc.stage", ""), run.info.run_name, run.info.status, url)
