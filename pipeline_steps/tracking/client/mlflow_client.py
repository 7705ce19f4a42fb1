"""Spool entries as MLflow calls. Everything here runs in the uploader or in `sonify sync`, never in a stage's process."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline_steps.tracking.client.offline_queue import OfflineQueue
from pipeline_steps.tracking.errors import EntryRejectedError, RunDeletedError, StoreUnavailableError
from pipeline_steps.tracking.settings import TrackingSettings, mlflow_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

Entry = dict[str, Any]
Result = TypeVar("Result")

RUN_KEY_TAG = "sonify.spool"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Opens MLflow's pages for training runs, not those for language-model applications."""
MAX_METRICS = 900
MAX_PARAMS = 90
BATCHED = ("metrics", "params", "tags")
REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "MALFORMED_REQUEST", "INVALID_STATE"}


class MlflowStore:
    """An MLflow store. Errors are sorted into `OutageError` (try again later) and `RejectedError` (never)."""

    def __init__(self, settings: TrackingSettings, timeout_s: int) -> None:
        os.environ.update(mlflow_environment(timeout_s))
        import mlflow

        self.settings = settings
        mlflow.set_tracking_uri(settings.uri)
        self.client: MlflowClient = mlflow.MlflowClient(tracking_uri=settings.uri)
        self._experiment_id = ""

    def call(self, function: Callable[[], Result]) -> Result:
        """Run `function`, sorting what goes wrong.

        Raises:
            OutageError, RejectedError: see the class.
        """
        from mlflow.exceptions import MlflowException

        try:
            return function()
        except MlflowException as error:
            if error.error_code in REFUSED:
                raise EntryRejectedError(str(error)) from error
            raise StoreUnavailableError(f"{error.error_code}: {_first_line(str(error))}") from error
        except (OSError, TimeoutError) as error:  # requests' exceptions are OSError
            raise StoreUnavailableError(f"{type(error).__name__}: {_first_line(str(error))}") from error

    def experiment_id(self) -> str:
        """Id of the project's experiment, made when it is missing."""
        if not self._experiment_id:
            self._experiment_id = self.call(self._find_experiment)
        return self._experiment_id

    def _find_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.settings.experiment
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                place = self.settings.artifacts or None
                return str(self.client.create_experiment(name, artifact_location=place, tags=EXPERIMENT_TAGS))
            except MlflowException as error:  # somebody else made it in between
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise error
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def open_run(self, spool: OfflineQueue) -> str:
        """Id of the spool's run: the one that carries its tag, or a new one."""
        header = spool.header()
        experiment = self.experiment_id()
        key = f"{spool.key}@{header['start_time']}"
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

    def groups(self, batch: Sequence[tuple[Entry, int]]) -> Iterator[list[tuple[Entry, int]]]:
        """Neighbouring metrics, params or tags go together, within MLflow's limits per request; others one by one."""
        group: list[tuple[Entry, int]] = []
        size = 0
        for item in batch:
            kind = item[0]["kind"]
            count = len(item[0].get("values", ())) if kind in BATCHED else 1
            limit = MAX_METRICS if kind == "metrics" else MAX_PARAMS
            if group and (kind not in BATCHED or group[0][0]["kind"] != kind or size + count > limit):
                yield group
                group, size = [], 0
            group.append(item)
            size += count
        if group:
            yield group

    def send(self, spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        """Send entries of one kind.

        Raises:
            OutageError, RejectedError, RunVanishedError.
        """
        from mlflow.exceptions import MlflowException

        try:
            getattr(self, f"_{entries[0]['kind']}")(spool, run_id, entries)
        except EntryRejectedError as error:
            cause = error.__cause__
            if isinstance(cause, MlflowException) and "deleted" in str(cause) and "state" in str(cause):
                raise RunDeletedError from error
            raise
        except StoreUnavailableError as error:
            cause = error.__cause__
            if isinstance(cause, MlflowException) and cause.error_code == "RESOURCE_DOES_NOT_EXIST" and "Run" in str(cause):
                raise RunDeletedError from error
            raise

    def _start(self, _spool: OfflineQueue, run_id: str, _entries: Sequence[Entry]) -> None:
        self.call(lambda: self.client.update_run(run_id, status="RUNNING"))

    def _end(self, _spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        entry = entries[-1]
        self.call(lambda: self.client.set_terminated(run_id, status=entry["status"], end_time=entry["time"]))

    def _metrics(self, _spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        rows = [Metric(key, value, entry["time"], entry["step"]) for entry in entries for key, value in entry["values"].items()]
        for start in range(0, len(rows), MAX_METRICS):
            part = rows[start : start + MAX_METRICS]
            self.call(lambda part=part: self.client.log_batch(run_id, metrics=part))  # type: ignore[misc]

    def _params(self, _spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Param, RunTag

        values = {key: value for entry in entries for key, value in entry["values"].items()}
        known = self.call(lambda: self.client.get_run(run_id)).data.params
        fresh = [Param(key, value) for key, value in values.items() if key not in known]
        # A run that is resumed with another value keeps its first parameter; MLflow allows no second one.
        changed = [RunTag(f"param_changed.{key}", value) for key, value in values.items() if known.get(key, value) != value]
        for start in range(0, len(fresh), MAX_PARAMS):
            part = fresh[start : start + MAX_PARAMS]
            self.call(lambda part=part: self.client.log_batch(run_id, params=part))  # type: ignore[misc]
        if changed:
            self.call(lambda: self.client.log_batch(run_id, tags=changed))

    def _tags(self, _spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import RunTag

        values = {key: value for entry in entries for key, value in entry["values"].items()}
        self.call(lambda: self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()]))

    def _image(self, spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        """A picture and its small twin, as `MlflowClient.log_image` would store them."""
        from PIL import Image

        for entry in entries:
            picture_file = _spooled(spool, entry["file"])
            small_file = picture_file.with_name(f"{picture_file.stem}+compressed.webp")
            with Image.open(picture_file) as picture:
                picture.thumbnail((256, 256))
                picture.save(small_file)
            for path in (picture_file, small_file):
                self._upload(run_id, path, "images")
        self.call(lambda: self.client.set_tag(run_id, "mlflow.loggedImages", "True"))

    def _artifact(self, spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._upload(run_id, _spooled(spool, entry["file"]), entry["folder"])

    def _upload(self, run_id: str, path: Path, folder: str) -> None:
        if path.is_dir():
            self.call(lambda: self.client.log_artifacts(run_id, str(path), f"{folder}/{path.name}".lstrip("/")))
        else:
            self.call(lambda: self.client.log_artifact(run_id, str(path), folder or None))

    def _input(self, _spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        from pipeline_steps.tracking.client.dataset_source import DvcDatasetSource

        for entry in entries:
            source = DvcDatasetSource(entry["path"], entry["digest"])
            data = Dataset(
                name=entry["name"],
                digest=entry["digest"],
                source_type=source._get_source_type(),
                source=source.to_json(),
                profile=json.dumps(entry["profile"]) if entry["profile"] else None,
            )
            inputs = [DatasetInput(data, [InputTag("mlflow.data.context", entry["context"])])]
            self.call(lambda inputs=inputs: self.client.log_inputs(run_id, inputs))  # type: ignore[misc]

    def _model(self, spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from pipeline_steps.tracking.client import model_logging

        for entry in entries:
            model_logging.log_model(self, spool, run_id, entry, _spooled(spool, entry["file"]))

    def _model_metrics(self, spool: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from pipeline_steps.tracking.client import model_logging

        for entry in entries:
            model_logging.log_model_metrics(self, spool, run_id, entry)

    def _unreadable(self, spool: OfflineQueue, _run_id: str, _entries: Sequence[Entry]) -> None:
        raise EntryRejectedError(f"a line of {spool.entries_file} is no entry: it was damaged on the disk")


def _spooled(spool: OfflineQueue, name: str) -> Path:
    path = spool.path_of(name)
    if not path.exists():
        raise EntryRejectedError(f"{path} has been removed")
    return path


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return "unknown"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
