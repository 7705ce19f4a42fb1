"""MLflow client: uploads queue entries. Used by the uploader, commands and flows, never in a stage's process."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from pipeline_steps.tracking.client.offline_queue import OfflineQueue
from pipeline_steps.tracking.errors import EntryRejectedError, StoreUnavailableError
from pipeline_steps.tracking.settings import TrackingSettings, mlflow_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Result = TypeVar("Result")

RUN_KEY_TAG = "sonify.spool"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Selects MLflow's pages for training runs instead of those for language-model applications."""
REJECTION_CODES = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST", "INVALID_STATE"}


def run_datasets(run: Run) -> dict[str, str]:
    """Name -> digest of the data sets that a run read."""
    return {found.dataset.name: found.dataset.digest for found in (run.inputs.dataset_inputs if run.inputs else ())}


class MlflowStore:
    """MLflow client that maps errors to `StoreUnavailableError` (retry later) and `EntryRejectedError` (permanent)."""

    def __init__(self, settings: TrackingSettings, timeout_s: int) -> None:
        os.environ.update(mlflow_environment(timeout_s))
        import mlflow

        self.settings = settings
        mlflow.set_tracking_uri(settings.uri)
        self.client: MlflowClient = mlflow.MlflowClient(tracking_uri=settings.uri)
        self._experiment_id = ""

    def call(self, function: Callable[[], Result]) -> Result:
        """Call `function` and map its errors.

        Raises:
            StoreUnavailableError, EntryRejectedError: see the class.
        """
        from mlflow.exceptions import MlflowException

        try:
            return function()
        except MlflowException as error:
            if error.error_code in REJECTION_CODES:
                raise EntryRejectedError(str(error)) from error
            raise StoreUnavailableError(f"{error.error_code}: {_first_line(str(error))}") from error
        except (OSError, TimeoutError) as error:  # requests' exceptions are OSError
            raise StoreUnavailableError(f"{type(error).__name__}: {_first_line(str(error))}") from error

    def experiment_id(self) -> str:
        """Id of the project's experiment, which is created if it does not exist."""
        if not self._experiment_id:
            self._experiment_id = self.call(self._find_experiment)
        return self._experiment_id

    def _find_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.settings.experiment
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                location = self.settings.artifacts or None
                return str(self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS))
            except MlflowException as error:  # another process created it in between
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise error
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def open_run(self, queue: OfflineQueue) -> str:
        """Id of the queue's MLflow run: the run with the queue's tag, or a new run."""
        header = queue.header()
        experiment = self.experiment_id()
        key = f"{queue.key}@{header['start_time']}"
        found = self.call(lambda: self.client.search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1))
        if found:
            return str(found[0].info.run_id)
        tags = {
            **header.get("tags", {}),
            RUN_KEY_TAG: key,
            "mlflow.user": _user(),
            "mlflow.source.name": f"python -m pipeline_steps {header['stage']}",
            "mlflow.source.type": "LOCAL",
        }
        run = self.call(
            lambda: self.client.create_run(experiment, start_time=header["start_time"], tags=tags, run_name=header["name"])
        )
        return str(run.info.run_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return "unknown"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
