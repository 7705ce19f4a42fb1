"""Links to MLflow runs: the runs of one flow run, and the runs that made given models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.mlflow_client import MlflowStore
from pipeline_steps.tracking.client.model_logging import find_model
from pipeline_steps.tracking.settings import read_settings, redact

LOCAL_UI = "http://127.0.0.1:5000"
"""Address at which `sonify ui` shows the default store."""


@dataclass(frozen=True, slots=True)
class RunLink:
    """Stage, status, origin (`this run` or `an earlier run`) and page of an MLflow run."""

    stage: str
    status: str
    made_by: str
    url: str


def linked_runs(layout: ProjectPaths, flow_run_id: str, digests: Iterable[str]) -> list[RunLink]:
    """MLflow runs of the stages of a flow run, in the order of their start, and runs that made models of earlier runs.

    Args:
        layout: paths of the project.
        flow_run_id: id of the flow run; empty: none.
        digests: DVC md5 of outs that were restored; outs that are no models are skipped.

    Raises:
        StoreUnavailableError: the store does not answer.
    """
    store = MlflowStore(read_settings(layout), timeout_s=10)
    base = redact(store.settings.uri).rstrip("/") if store.settings.is_server else LOCAL_UI
    query, order = f"tags.flow_run_id = '{flow_run_id}'", ["attributes.start_time ASC"]
    own = store.call(store.client.search_runs, [store.experiment_id()], query, order_by=order) if flow_run_id else []
    models = [model for digest in digests if (model := find_model(store, digest)) is not None]
    earlier = [store.call(store.client.get_run, model.source_run_id) for model in models if model.source_run_id]
    return [
        RunLink(
            run.data.tags.get("dvc.stage") or run.info.run_name,
            run.info.status,
            made_by,
            f"{base}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}",
        )
        for runs, made_by in ((own, "this run"), (earlier, "an earlier run"))
        for run in runs
    ]
