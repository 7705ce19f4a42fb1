"""Entries of the offline queue as MLflow calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline_steps.tracking.client import model_logging
from pipeline_steps.tracking.client.mlflow_client import REJECTION_CODES, MlflowStore
from pipeline_steps.tracking.client.offline_queue import OfflineQueue
from pipeline_steps.tracking.errors import EntryRejectedError, RunDeletedError, StoreUnavailableError

MAX_METRICS = 900
MAX_PARAMS = 90
LOCK_TIMEOUT_S = 60
BATCHED = ("metrics", "params", "tags")
Entry = dict[str, Any]


class MlflowWriter(MlflowStore):
    """Client that uploads the entries of the offline queue."""

    def groups(self, batch: Sequence[tuple[Entry, int]]) -> Iterator[list[tuple[Entry, int]]]:
        """Group consecutive metrics, params or tags up to MLflow's limits per request; other entries stay alone."""
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

    def send(self, queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        """Upload entries of one kind.

        Raises:
            StoreUnavailableError, EntryRejectedError, RunDeletedError: the upload failed.
        """
        from mlflow.exceptions import MlflowException

        kind = entries[0]["kind"]
        try:
            if kind in BATCHED:
                getattr(self, f"_{kind}")(run_id, entries)
            else:
                for entry in entries:
                    getattr(self, f"_{kind}")(queue, run_id, entry)
        except (EntryRejectedError, StoreUnavailableError) as error:
            cause, text = error.__cause__, str(error.__cause__)
            if isinstance(cause, MlflowException) and (
                ("deleted" in text and "state" in text)
                if cause.error_code in REJECTION_CODES
                else (cause.error_code == "RESOURCE_DOES_NOT_EXIST" and "Run" in text)
            ):
                raise RunDeletedError from error
            raise

    def _start(self, _queue: OfflineQueue, run_id: str, _entry: Entry) -> None:
        self.call(self.client.update_run, run_id, status="RUNNING")

    def _parent(self, queue: OfflineQueue, run_id: str, entry: Entry) -> None:
        """Put the run below the run of its pipeline, which is created if the store does not have it yet."""
        parent = OfflineQueue(queue.folder.parent / entry["key"])
        if not (parent.folder / "run.json").is_file():
            raise EntryRejectedError(f"{parent.folder} has been removed")
        try:
            with FileLock(parent.lock_file, timeout=LOCK_TIMEOUT_S):  # the uploader of another stage may create it now
                parent_id = self.open_run(parent)
        except Timeout as error:
            raise StoreUnavailableError(f"another process is uploading {parent.key}") from error
        self.call(self.client.set_tag, run_id, "mlflow.parentRunId", parent_id)

    def _status(self, _queue: OfflineQueue, run_id: str, entry: Entry) -> None:
        """Show the state of the last stage as that of the pipeline, which a later process may continue."""
        self.call(self.client.set_terminated, run_id, status=entry["state"], end_time=entry["time"])

    def _end(self, _queue: OfflineQueue, run_id: str, entry: Entry) -> None:
        self.call(self.client.set_terminated, run_id, status=entry["status"], end_time=entry["time"])

    def _metrics(self, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        rows = [Metric(key, value, entry["time"], entry["step"]) for entry in entries for key, value in entry["values"].items()]
        for start in range(0, len(rows), MAX_METRICS):
            self.call(self.client.log_batch, run_id, metrics=rows[start : start + MAX_METRICS])

    def _params(self, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Param, RunTag

        values = {key: value for entry in entries for key, value in entry["values"].items()}
        logged = self.call(self.client.get_run, run_id).data.params
        new = [Param(key, value) for key, value in values.items() if key not in logged]
        # MLflow does not allow a second value: a run resumed with another value keeps the first one and gets a tag.
        changed = [RunTag(f"param_changed.{key}", value) for key, value in values.items() if logged.get(key, value) != value]
        for start in range(0, len(new), MAX_PARAMS):
            self.call(self.client.log_batch, run_id, params=new[start : start + MAX_PARAMS])
        if changed:
            self.call(self.client.log_batch, run_id, tags=changed)

    def _tags(self, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import RunTag

        values = {key: value for entry in entries for key, value in entry["values"].items()}
        self.call(self.client.log_batch, run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def _image(self, queue: OfflineQueue, run_id: str, entry: Entry) -> None:
        """Upload an image and its thumbnail under the names that `MlflowClient.log_image` uses."""
        from PIL import Image

        image_file = _queued_file(queue, entry["file"])
        thumbnail_file = image_file.with_name(f"{image_file.stem}+compressed.webp")
        with Image.open(image_file) as image:
            image.thumbnail((256, 256))
            image.save(thumbnail_file)
        for path in (image_file, thumbnail_file):
            self.call(self.client.log_artifact, run_id, str(path), "images")
        self.call(self.client.set_tag, run_id, "mlflow.loggedImages", "True")

    def _artifact(self, queue: OfflineQueue, run_id: str, entry: Entry) -> None:
        path, folder = _queued_file(queue, entry["file"]), entry["folder"]
        if path.is_dir():
            self.call(self.client.log_artifacts, run_id, str(path), f"{folder}/{path.name}".lstrip("/"))
        else:
            self.call(self.client.log_artifact, run_id, str(path), folder or None)

    def _input(self, _queue: OfflineQueue, run_id: str, entry: Entry) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        from pipeline_steps.tracking.client.dataset_source import DvcDatasetSource

        source = DvcDatasetSource(entry["path"], entry["digest"])
        profile = json.dumps(entry["profile"]) if entry["profile"] else None
        data = Dataset(entry["name"], entry["digest"], source._get_source_type(), source.to_json(), profile=profile)
        inputs = [DatasetInput(data, [InputTag("mlflow.data.context", entry["context"])])]
        self.call(self.client.log_inputs, run_id, inputs)

    def _model(self, queue: OfflineQueue, run_id: str, entry: Entry) -> None:
        model_logging.log_model(self, queue, run_id, entry, _queued_file(queue, entry["file"]))

    def _model_metrics(self, queue: OfflineQueue, run_id: str, entry: Entry) -> None:
        model_logging.log_model_metrics(self, queue, run_id, entry)

    def _unreadable(self, queue: OfflineQueue, _run_id: str, _entry: Entry) -> None:
        raise EntryRejectedError(f"a line of {queue.entries_file} is not an entry; it was damaged on disk")


def _queued_file(queue: OfflineQueue, name: str) -> Path:
    path = queue.path_of(name)
    if not path.exists():
        raise EntryRejectedError(f"{path} has been removed")
    return path
