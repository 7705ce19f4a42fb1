"""MLflow client: uploads queue entries. Used by the uploader, commands and flows, never in a stage's process."""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from pipeline_steps.tracking.client.offline_queue import OfflineQueue
from pipeline_steps.tracking.errors import EntryRejectedError, StoreUnavailableError
from pipeline_steps.tracking.settings import TrackingSettings, mlflow_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

RUN_KEY_TAG = "sonify.spool"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Selects MLflow's pages for training runs instead of those for language-model applications."""
REJECTION_CODES = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST", "INVALID_STATE"}


def run_datasets(run: Run | None) -> dict[str, str]:
    """Name -> digest of the data sets that a run read."""
    return {found.dataset.name: found.dataset.digest for found in (run.inputs.dataset_inputs if run and run.inputs else ())}


class MlflowStore:
    """MLflow client that maps errors to `StoreUnavailableError` (retry later) and `EntryRejectedError` (permanent)."""

    def __init__(self, settings: TrackingSettings, timeout_s: int) -> None:
        os.environ.update(mlflow_environment(timeout_s))
        import mlflow

        self.settings = settings
        mlflow.set_tracking_uri(settings.uri)
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
        except MlflowException as error:
            if error.error_code in REJECTION_CODES:
                raise EntryRejectedError(str(error)) from error
            raise StoreUnavailableError(f"{error.error_code}: {_first_line(str(error))}") from error
        except (OSError, TimeoutError) as error:  # requests' exceptions are OSError
            raise StoreUnavailableError(f"{type(error).__name__}: {_first_line(str(error))}") from error

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
                raise StoreUnavailableError(f"experiment {name!r} cannot be created")
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
            **header.get("tags", {}),
            RUN_KEY_TAG: key,
            "mlflow.user": _user(),
            "mlflow.source.name": f"python -m pipeline_steps {header['stage']}",
            "mlflow.source.type": "LOCAL",
        }
        run = self.call(self.client.create_run, experiment, header["start_time"], tags, run_name=header["name"])
        return str(run.info.run_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return "unknown"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
