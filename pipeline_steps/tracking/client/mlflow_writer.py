"""Entries of the offline queue as MLflow calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline_steps.tracking.client import model_logging
from pipeline_steps.tracking.client.mlflow_client import MlflowStore
from pipeline_steps.tracking.client.offline_queue import OfflineQueue
from pipeline_steps.tracking.errors import EntryRejectedError, RunDeletedError, StoreUnavailableError

MAX_METRICS = 900
MAX_PARAMS = 90
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

        try:
            getattr(self, f"_{entries[0]['kind']}")(queue, run_id, entries)
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

    def _start(self, _queue: OfflineQueue, run_id: str, _entries: Sequence[Entry]) -> None:
        self.call(lambda: self.client.update_run(run_id, status="RUNNING"))

    def _end(self, _queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        entry = entries[-1]
        self.call(lambda: self.client.set_terminated(run_id, status=entry["status"], end_time=entry["time"]))

    def _metrics(self, _queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        rows = [Metric(key, value, entry["time"], entry["step"]) for entry in entries for key, value in entry["values"].items()]
        for start in range(0, len(rows), MAX_METRICS):
            part = rows[start : start + MAX_METRICS]
            self.call(lambda part=part: self.client.log_batch(run_id, metrics=part))  # type: ignore[misc]

    def _params(self, _queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Param, RunTag

        values = {key: value for entry in entries for key, value in entry["values"].items()}
        logged = self.call(lambda: self.client.get_run(run_id)).data.params
        new = [Param(key, value) for key, value in values.items() if key not in logged]
        # MLflow does not allow a second value: a run resumed with another value keeps the first one and gets a tag.
        changed = [RunTag(f"param_changed.{key}", value) for key, value in values.items() if logged.get(key, value) != value]
        for start in range(0, len(new), MAX_PARAMS):
            part = new[start : start + MAX_PARAMS]
            self.call(lambda part=part: self.client.log_batch(run_id, params=part))  # type: ignore[misc]
        if changed:
            self.call(lambda: self.client.log_batch(run_id, tags=changed))

    def _tags(self, _queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        from mlflow.entities import RunTag

        values = {key: value for entry in entries for key, value in entry["values"].items()}
        self.call(lambda: self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()]))

    def _image(self, queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        """Upload an image and its thumbnail under the names that `MlflowClient.log_image` uses."""
        from PIL import Image

        for entry in entries:
            image_file = _queued_file(queue, entry["file"])
            thumbnail_file = image_file.with_name(f"{image_file.stem}+compressed.webp")
            with Image.open(image_file) as image:
                image.thumbnail((256, 256))
                image.save(thumbnail_file)
            for path in (image_file, thumbnail_file):
                self._upload(run_id, path, "images")
        self.call(lambda: self.client.set_tag(run_id, "mlflow.loggedImages", "True"))

    def _artifact(self, queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._upload(run_id, _queued_file(queue, entry["file"]), entry["folder"])

    def _upload(self, run_id: str, path: Path, folder: str) -> None:
        if path.is_dir():
            self.call(lambda: self.client.log_artifacts(run_id, str(path), f"{folder}/{path.name}".lstrip("/")))
        else:
            self.call(lambda: self.client.log_artifact(run_id, str(path), folder or None))

    def _input(self, _queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
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

    def _model(self, queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        for entry in entries:
            model_logging.log_model(self, queue, run_id, entry, _queued_file(queue, entry["file"]))

    def _model_metrics(self, queue: OfflineQueue, run_id: str, entries: Sequence[Entry]) -> None:
        for entry in entries:
            model_logging.log_model_metrics(self, queue, run_id, entry)

    def _unreadable(self, queue: OfflineQueue, _run_id: str, _entries: Sequence[Entry]) -> None:
        raise EntryRejectedError(f"a line of {queue.entries_file} is not an entry; it was damaged on disk")


def _queued_file(queue: OfflineQueue, name: str) -> Path:
    path = queue.path_of(name)
    if not path.exists():
        raise EntryRejectedError(f"{path} has been removed")
    return path
