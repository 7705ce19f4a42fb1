"""MLflow client: uploads queue entries. Used by the uploader, commands and flows, never in a stage's process."""

from __future__ import annotations

import getpass
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from pipeline_steps.tracking.client.offline_queue import OfflineQueue
from pipeline_steps.tracking.client.pipeline_run import PIPELINE
from pipeline_steps.tracking.errors import EntryRejectedError, StoreUnavailableError
from pipeline_steps.tracking.settings import DEFAULT_STORE, TrackingSettings, mlflow_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

RUN_KEY_TAG = "sonify.spool"
TRACKING_URI = "MLFLOW_TRACKING_URI"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Selects MLflow's pages for training runs instead of those for language-model applications."""
REJECTION_CODES = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST", "INVALID_STATE"}


ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's database that hold artifact addresses."""


def run_datasets(run: Run | None) -> dict[str, str]:
    """Name -> digest of the data sets that a run read."""
    return {found.dataset.name: found.dataset.digest for found in (run.inputs.dataset_inputs if run and run.inputs else ())}


def relocate_artifacts(settings: TrackingSettings) -> None:
    """Point the artifact addresses in the project's own database at the project, after its folder was moved or copied.

    MLflow stores absolute addresses: without this, a copy would write into the original and show its files.
    """
    if settings.store != DEFAULT_STORE or settings.is_missing:
        return
    with closing(sqlite3.connect(settings.uri.removeprefix("sqlite:///"), timeout=60)) as database:
        try:
            found = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        except sqlite3.OperationalError:  # an empty file: MLflow creates the tables
            return
        stale = {old for (old,) in found if old and old.endswith("/mlartifacts") and old != settings.artifacts}
        with database:
            for old in stale:
                for table, column in ADDRESSES:
                    change = f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608 - constants
                    where = f"WHERE {column} = ? OR substr({column}, 1, ?) = ?"
                    database.execute(f"{change} {where}", (settings.artifacts, len(old) + 1, old, len(old) + 1, f"{old}/"))


class MlflowStore:
    """MLflow client that maps errors to `StoreUnavailableError` (retry later) and `EntryRejectedError` (permanent)."""

    def __init__(self, settings: TrackingSettings, timeout_s: int) -> None:
        os.environ.update(mlflow_environment(timeout_s))
        relocate_artifacts(settings)
        import mlflow

        self.settings = settings
        chosen = os.environ.get(TRACKING_URI)
        mlflow.set_tracking_uri(settings.uri)
        os.environ.pop(TRACKING_URI, None)  # MLflow sets it, and another project of this process would use this store
        if chosen is not None:
            os.environ[TRACKING_URI] = chosen
        self.client: MlflowClient = mlflow.MlflowClient(tracking_uri=settings.uri)
        self._experiment_id = ""

    def call(self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        """Call a method of the client and map its errors.

        Raises:
            StoreUnavailableError, EntryRejectedError: see the class.
        """
        from mlflow.exceptions import MlflowException

        try:
            return function(*args, **kwargs)
        except (MlflowException, OSError) as error:  # exceptions of requests and TimeoutError are OSError
            code = getattr(error, "error_code", type(error).__name__)
            if code in REJECTION_CODES:
                raise EntryRejectedError(str(error)) from error
            first_line, _, _ = str(error).strip().partition("\n")
            raise StoreUnavailableError(f"{code}: {first_line}") from error

    def experiment_id(self) -> str:
        """Id of the project's experiment, which is created if it does not exist."""
        if not self._experiment_id:
            name, client = self.settings.experiment, self.client
            found = self.call(client.get_experiment_by_name, name)
            if found is None:
                with suppress(EntryRejectedError):  # another process may create it at the same time
                    self.call(client.create_experiment, name, self.settings.artifacts or None, tags=EXPERIMENT_TAGS)
                found = self.call(client.get_experiment_by_name, name)
            if found is None:
                raise EntryRejectedError(f"experiment {name!r} cannot be created")
            if found.lifecycle_stage == "deleted":
                self.call(client.restore_experiment, found.experiment_id)
            self._experiment_id = str(found.experiment_id)
        return self._experiment_id

    def open_run(self, queue: OfflineQueue) -> str:
        """Id of the queue's MLflow run: the run with the queue's tag, or a new run."""
        header = queue.header()
        experiment = self.experiment_id()
        key = f"{queue.key}@{header['start_time']}"
        found = self.call(self.client.search_runs, [experiment], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {
            RUN_KEY_TAG: key,
            "mlflow.user": _user(),
            "mlflow.source.name": "dvc repro" if header["stage"] == PIPELINE else f"python -m pipeline_steps {header['stage']}",
            "mlflow.source.type": "LOCAL",
        }
        run = self.call(self.client.create_run, experiment, header["start_time"], tags, run_name=header["name"])
        return str(run.info.run_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return "unknown"
