"""Parent run of a pipeline run: the MLflow run with the runs of the stages below it.

Stages are separate processes, and a plain `dvc repro` tells them nothing of each other. They agree on the parent by content: it
is the offline queue whose key is the digest of all parameters, of the experiment's name and of the flow run. The parent ends
with the last stage. Until then a later `dvc repro` of the same parameters, for example after a crash, continues it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pipeline_steps.core.config import load_params
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.pool_check import pool_roots
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.offline_queue import OfflineQueue, open_queue

PIPELINE = "pipeline"
"""Stage name of a parent run."""
LAST_STAGE = "evaluate"
"""Stage that ends a pipeline run."""
EXPERIMENT_TAG = "dvc.exp.name"


def experiment_name() -> str:
    """Name of the experiment: that of `dvc exp run`, else that of the flow run; empty for a plain `dvc repro`."""
    return os.environ.get("DVC_EXP_NAME") or os.environ.get("SONIFY_RUN_NAME") or ""


def read_params(layout: ProjectPaths) -> dict[str, Any]:
    """All parameters of a project; empty without `params.yaml`."""
    return load_params(layout.params) if layout.params.is_file() else {}


def open_pipeline(project: ProjectPaths, layout: ProjectPaths, store: str) -> tuple[OfflineQueue, Mapping[str, Any]] | None:
    """Queue of the parent run and the parameters of the pipeline; None for a stage that DVC does not run.

    Args:
        project: paths of the project that keeps the queues.
        layout: paths of the folder in which the stage runs.
        store: name of the store.

    Raises:
        OSError: the queue cannot be created.
    """
    if "DVC_STAGE" not in os.environ:  # a stage by hand, or the evaluation of another version
        return None
    params = read_params(layout)
    experiment = experiment_name()
    key = fingerprint({"params": params, "experiment": experiment, "flow_run": os.environ.get("SONIFY_FLOW_RUN_ID", "")})
    names = identity_tags(layout, params)
    title = " ".join([names["dataset"], *([f"seed {names['seed']}"] if "seed" in names else []), experiment]).strip()
    return open_queue(project, PIPELINE, key, {"uri": store, "name": title}), params


def identity_tags(layout: ProjectPaths, params: Mapping[str, Any]) -> dict[str, str]:
    """Tags that name a run and a model version: data set, seed of the training, experiment."""
    train = params.get("train") or {}
    names = [PurePosixPath(root).name for root in pool_roots(params).values()]
    tags = {"dataset": " + ".join(filter(None, names[:3])) or layout.root.resolve().name}
    tags |= {"seed": str(train["seed"])} if "seed" in train else {}
    return tags | ({EXPERIMENT_TAG: experiment_name()} if experiment_name() else {})
