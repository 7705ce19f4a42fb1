"""Tracker: logs parameters, metrics, media, artifacts and models of a stage's run.

    from pipeline_steps import tracking

    def run(config: TrainConfig, layout: ProjectPaths) -> StageReport:
        with tracking.run("train", layout, config, inputs=[layout.pairs, layout.media], resume_key=digest) as tracker:
            tracker.log_metrics({"train/loss": 0.3}, step=10)
            tracker.log_image("samples/grid", grid, step=10)          # uint8 [H, W, 3]
            tracker.log_audio("test/dog", samples, 48_000)            # float32 [T]
            tracker.log_artifact(layout.report("train"), folder="reports")
            tracker.log_model(layout.model)                           # once the folder is complete

`run` logs the parameters (the whole section), tags (git commit, stage, `dvc.inputs`) and the data sets in `inputs`. Every call
appends to a queue on local disk and returns. A child process uploads the queue to MLflow while the stage runs and has a limited
time to finish at its end. An unavailable server therefore costs at most this wait: the remaining entries stay in the queue, one
warning is printed, and `sonify sync` uploads them later to the same run. A run with the same `resume_key` after a crash is the
same MLflow run.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.atomic import link_or_copy
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ServiceError
from pipeline_steps.core.presets import flatten
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.offline_queue import FINISHED, OfflineQueue, open_queue
from pipeline_steps.tracking.client.pipeline_run import (
    EXPERIMENT_TAG,
    LAST_STAGE,
    experiment_name,
    identity_tags,
    open_pipeline,
    read_params,
)
from pipeline_steps.tracking.client.system_metrics import log_system_metrics
from pipeline_steps.tracking.lineage import dvc_digests
from pipeline_steps.tracking.settings import (
    TrackingSettings,
    child_environment,
    is_secret_name,
    project_root,
    read_settings,
    redact,
)

log = logging.getLogger(__name__)

MAX_PARAM_LENGTH = 6000
MAX_KEY_LENGTH = 250
INTERRUPTED_WAIT_S = 5.0
"""Longest wait for the uploader after Ctrl+C or SIGTERM."""


class NoOpTracker:
    """Tracker that logs nothing, for tracking mode `off`. It defines the interface of `Tracker`."""

    @property
    def run_id(self) -> str:
        """MLflow run id; always empty."""
        return ""

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; nested mappings become dotted keys. Values of secret-looking keys are replaced by `***`."""

    def log_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the run."""

    def log_metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Log numbers at a step; nested mappings become `outer/inner`. NaN and infinity are dropped and counted."""

    def log_image(self, key: str, image: ByteArray, step: int = 0) -> None:
        """Log an image, uint8 [H, W, 3] or [H, W], at a step. MLflow shows images of one key as a series.

        Images go to the parent run, if there is one. MLflow's tile shows the parameters of a run before the image, and those of
        a stage leave no room for it; the parent has none.
        """

    def log_audio(self, name: str, samples: FloatArray, rate: int) -> None:
        """Log mono audio, float32 [T] in [-1, 1] at `rate` Hz, as a WAV artifact below `audio/`."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Log a file or folder below `folder` in the run's artifacts."""

    def log_input(self, name: str, digest: str, path: str, context: str, profile: Mapping[str, Any] | None = None) -> None:
        """Log a data set that the run reads: `digest` is its DVC md5, `path` is relative to the project."""

    def log_model(self, folder: Path) -> None:
        """Log an exported model as a pyfunc and register it as `audio2image` with the alias `challenger`."""

    def log_model_metrics(
        self, folder: Path, values: Mapping[str, Any], dataset: Path | None = None, warnings: Sequence[str] = ()
    ) -> None:
        """Log numbers of the model in `folder`, measured on `dataset`, to the logged model with the same bytes.

        Its versions get a description with the numbers and the warnings.
        """

    def log_pipeline_metrics(self, values: Mapping[str, Any]) -> None:
        """Log numbers of the whole pipeline to the parent run, see `pipeline_run.py`."""


class Tracker(NoOpTracker):
    """Tracker that writes to an offline queue. Failed writes are counted and never stop a stage."""

    def __init__(self, queue: OfflineQueue, layout: ProjectPaths, parent: Tracker | None = None) -> None:
        self._queue = queue
        self._parent = parent
        self._layout = layout
        self._lock = threading.Lock()
        self._failed_writes = 0
        self._write_error = ""
        # A run resumed from a checkpoint repeats steps that are in the queue already.
        self._last_steps = queue.last_steps()
        self._nonfinite = 0

    @property
    def run_id(self) -> str:
        """MLflow run id; empty until the uploader has created the run."""
        return self._queue.state().run_id

    def next_system_step(self) -> int:
        """Step of the next system metrics; a resumed run continues the numbers."""
        return 1 + max((step for key, step in self._last_steps.items() if key.startswith("system/")), default=-1)

    def log_params(self, values: Mapping[str, Any]) -> None:
        clean = {_key(key): _redacted(key, value)[:MAX_PARAM_LENGTH] for key, value in flatten(values) if value != {}}
        if clean:
            self._append("params", values=clean)

    def log_tags(self, values: Mapping[str, Any]) -> None:
        self._append("tags", values={_key(key): _redacted(key, value) for key, value in values.items()})

    def log_metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        numbers = {key: value for key, value in self._numbers(values).items() if step > self._last_steps.get(key, -1)}
        if numbers:
            self._append("metrics", values=numbers, step=int(step))

    def log_image(self, key: str, image: ByteArray, step: int = 0) -> None:
        if image.dtype != np.uint8 or image.ndim not in {2, 3}:
            raise ValueError(f"image {key!r} must be uint8 [H, W, 3] or [H, W], got {image.dtype} {image.shape}")
        if self._parent is not None:
            self._parent.log_image(key, image, step)
            return
        from PIL import Image

        if step <= self._last_steps.get(_key(key), -1):
            return
        with self._guard():
            folder = self._queue.new_folder()
            # The file name that MLflow's image grid parses. The folder's number replaces its random id: a retry overwrites.
            stem = f"{_key(key).replace('/', '~')}+step+{int(step)}+timestamp+{time.time_ns() // 1_000_000}+{folder.name}"
            path = folder / f"{stem}.png"
            Image.fromarray(image).save(path, format="PNG", compress_level=1)
            self._append("image", key=_key(key), step=int(step), file=self._queue.name_of(path))

    def log_audio(self, name: str, samples: FloatArray, rate: int) -> None:
        if samples.ndim != 1:
            raise ValueError(f"audio {name!r} must be mono [T], got shape {samples.shape}")
        import soundfile

        with self._guard():
            path = self._queue.new_folder() / f"{_leaf(name)}.wav"
            soundfile.write(path, np.clip(samples, -1.0, 1.0), rate, subtype="PCM_16", format="WAV")
            folder = _artifact_folder(f"audio/{name}".rpartition("/")[0])
            self._append("artifact", file=self._queue.name_of(path), folder=folder)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        with self._guard():
            copy = self._queue.new_folder() / _leaf(path.name)
            if path.is_dir():
                shutil.copytree(path, copy, copy_function=shutil.copyfile)
            else:
                shutil.copyfile(path, copy)
            self._append("artifact", file=self._queue.name_of(copy), folder=_artifact_folder(folder))

    def log_input(self, name: str, digest: str, path: str, context: str, profile: Mapping[str, Any] | None = None) -> None:
        self._append("input", name=name, digest=digest, path=path, context=context, profile=dict(profile or {}))

    def log_model(self, folder: Path) -> None:
        with self._guard():
            copy = self._queue.new_folder()
            # Hard links are safe: an export is replaced by rename, never written in place.
            shutil.copytree(folder, copy / "model", copy_function=link_or_copy)
            _copy_code(copy / "code")
            digest = dvc_digests.hash_path(copy / "model")
            tags = dvc_digests.model_tags(self._layout, folder) | identity_tags(self._layout, read_params(self._layout))
            path = dvc_digests.relative(self._layout, folder)
            self._append("model", file=self._queue.name_of(copy), digest=digest, path=path, tags=tags)

    def log_model_metrics(
        self, folder: Path, values: Mapping[str, Any], dataset: Path | None = None, warnings: Sequence[str] = ()
    ) -> None:
        numbers = self._numbers(values)
        if not numbers:
            return
        with self._guard():
            data: dict[str, str] = {}
            if dataset is not None:
                name, digest = dvc_digests.relative(self._layout, dataset), dvc_digests.dvc_digest(self._layout, dataset)[0]
                data = {"name": name, "digest": digest}
            digest, notes = dvc_digests.dvc_digest(self._layout, folder)[0], list(warnings)
            self._append("model_metrics", digest=digest, values=numbers, dataset=data, warnings=notes)

    def log_pipeline_metrics(self, values: Mapping[str, Any]) -> None:
        if self._parent is not None:
            self._parent.log_metrics(values)

    def close(self, status: str) -> None:
        """Write the last entry of the run and its status to the parent; it is one of MLflow's FINISHED, FAILED, KILLED."""
        if self._parent is not None:
            if status == FINISHED and self._queue.header()["stage"] == LAST_STAGE:
                self._parent._append("end", status=status)
            else:
                self._parent._append("status", state=status)
        if self._nonfinite:
            self._append("tags", values={"metrics.dropped_nonfinite": str(self._nonfinite)})
            log.warning("tracking: %d metric values were NaN or infinite and were dropped", self._nonfinite)
        self._append("end", status=status)
        if self._failed_writes:
            text = "tracking: %d entries could not be written to %s: %s"
            log.warning(text, self._failed_writes, self._queue.folder, self._write_error)

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for key, value in flatten(values, "/"):
            if not isinstance(value, (bool, int, float, np.number, np.bool_)):
                continue
            number = float(value)
            if math.isfinite(number):
                numbers[_key(key)] = number
            else:  # MLflow would store infinity as 1.8e308
                self._nonfinite += 1
        return numbers

    def _append(self, kind: str, **values: Any) -> None:
        with self._guard():
            self._queue.append(kind, **values)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Count an entry that cannot be written (full disk, missing file) instead of stopping the stage."""
        try:
            yield
        except OSError as error:
            with self._lock:
                self._failed_writes += 1
                self._write_error = str(error)


def _start_uploader(settings: TrackingSettings, queues: Sequence[OfflineQueue]) -> subprocess.Popen[bytes] | None:
    """Start the child process that uploads the queues to MLflow. It runs while the pipe to its standard input is open."""
    command = [
        sys.executable,
        "-m",
        "pipeline_steps.tracking.client.uploader",
        *(str(each.folder.resolve()) for each in queues),
    ]
    environment = child_environment(settings)
    try:
        with (queues[0].folder / "uploader.log").open("ab") as output:
            # A session of its own: Ctrl+C must only reach the stage; the uploader exits when the pipe closes.
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True
            )
    except OSError as error:
        log.warning("tracking: the uploader could not be started (%s); entries stay in the queue", error)
        return None


def _finish_upload(uploader: subprocess.Popen[bytes], seconds: float) -> None:
    """Request the upload of the remaining entries, wait at most `seconds`, then kill the process."""
    try:
        uploader.communicate(timeout=seconds)  # closes standard input
    except subprocess.TimeoutExpired:
        uploader.kill()
        uploader.wait()


@contextmanager
def run(
    stage: str,
    layout: ProjectPaths,
    config: StageConfig,
    *,
    inputs: Sequence[Path] = (),
    resume_key: str | None = None,
) -> Iterator[NoOpTracker]:
    """Track one run of a stage. Under DVC it is below the run of its pipeline, see `pipeline_run.py`.

    Args:
        stage: stage name, and name of the MLflow run.
        layout: paths of the project.
        config: configuration of the stage; logged as parameters.
        inputs: outs of earlier stages that this stage reads; logged as data sets with their DVC md5 as digest.
        resume_key: runs of the same stage and key are one MLflow run until one of them finishes.

    Raises:
        ConfigError: a tracking variable is not valid.
        ServiceError: entries could not be uploaded in mode `strict`.
    """
    settings = read_settings(layout)
    if settings.mode == "off":
        yield NoOpTracker()
        return
    project = ProjectPaths(project_root(layout.root))
    try:
        queue = open_queue(project, stage, resume_key, {"uri": settings.store, "name": stage})
        pipeline = open_pipeline(project, layout, settings.store)
    except OSError as error:
        log.warning("tracking: the queue cannot be created (%s); this run is not tracked", error)
        yield NoOpTracker()
        return
    parent = Tracker(pipeline[0], layout) if pipeline else None
    queues = [queue, *([pipeline[0]] if pipeline else [])]
    tracker = Tracker(queue, layout, parent)
    uploader = _start_uploader(settings, queues) if settings.mode != "queue" else None
    tracker._append("start")
    if pipeline and parent:
        _log_pipeline_start(parent, layout, *pipeline)
        tracker._append("parent", key=pipeline[0].key)
    _log_start(tracker, layout, stage, config, inputs)
    status, wait_s = "FAILED", settings.deadline_s
    try:
        with log_system_metrics(tracker.log_metrics, tracker.next_system_step()):
            yield tracker
        status = FINISHED
    except BaseException as error:
        if not isinstance(error, Exception):  # interrupted: a user or a scheduler waits for the exit
            status, wait_s = "KILLED", min(wait_s, INTERRUPTED_WAIT_S)
        raise
    finally:
        tracker.close(status)
        if uploader is not None:
            _finish_upload(uploader, wait_s)
        unsent = sum(_prune_or_warn(each, settings) for each in queues) if settings.mode != "queue" else 0
    if unsent and settings.mode == "strict":
        raise ServiceError(
            f"{unsent} tracking entries could not be sent to {redact(settings.uri)}", "run: sonify sync", transient=True
        )


def _log_pipeline_start(parent: Tracker, layout: ProjectPaths, queue: OfflineQueue, params: Mapping[str, Any]) -> None:
    """Log `params.yaml` and tags of a new parent run; one that goes on is running again."""
    is_new = not queue.entries_file.exists() and not queue.state().sent
    parent._append("start")
    if is_new:
        parent.log_artifact(layout.params)
        parent.log_tags({**dvc_digests.git_tags(layout), **identity_tags(layout, params), **_flow_tags()})


def _flow_tags() -> dict[str, str]:
    flow_run = os.environ.get("SONIFY_FLOW_RUN_ID")
    return {"flow_run_id": flow_run} if flow_run else {}


def _log_start(tracker: Tracker, layout: ProjectPaths, stage: str, config: StageConfig, inputs: Sequence[Path]) -> None:
    params = config.model_dump(mode="json")
    tracker.log_params(params)
    digests: dict[str, str] = {}
    source = "hashed"
    for path in inputs:
        name = dvc_digests.relative(layout, path)
        try:
            digests[name], source = dvc_digests.dvc_digest(layout, path)
        except OSError as error:
            log.warning("tracking: input %s has no digest (%s)", name, error)
            continue
        context = "training" if stage == "train" else "evaluation" if stage == "evaluate" else stage
        tracker.log_input(name, digests[name], name, context)
    tags = {**dvc_digests.git_tags(layout), "dvc.stage": os.environ.get("DVC_STAGE", stage), "dvc.digest_source": source}
    tags |= _flow_tags() | ({EXPERIMENT_TAG: experiment_name()} if experiment_name() else {})
    tags |= {"dvc.inputs": dvc_digests.inputs_digest(digests, params), "params.digest": dvc_digests.inputs_digest({}, params)}
    tracker.log_tags(tags)


def _prune_or_warn(queue: OfflineQueue, settings: TrackingSettings) -> int:
    """Prune a completely uploaded queue or print a warning. Returns the number of entries that were not uploaded."""
    unsent = queue.unsent()
    state = queue.state()
    if not unsent:
        if state.ended == FINISHED:
            queue.prune()
        return 0
    reason = state.problem or "timeout"
    text = f"tracking: {unsent} entries not sent to {redact(settings.uri)} ({reason}); they stay in {queue.folder}"
    print(f"{text}; run: sonify sync", file=sys.stderr, flush=True)
    return unsent


def _redacted(key: str, value: Any) -> str:
    """A value as text without secrets. A string under a secret-looking key is one, a number is not (`tokens: 8`)."""
    return "***" if isinstance(value, str) and value and is_secret_name(key) else redact(str(value))


def _key(key: str) -> str:
    """Make a key valid for MLflow: letters, digits, `_-. /`; no `..`, no leading slash."""
    clean = re.sub(r"[^A-Za-z0-9_\-. /]", "_", key)[:MAX_KEY_LENGTH]
    return "/".join(part for part in clean.split("/") if part not in {"", ".", ".."}) or "_"


def _leaf(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", name.rsplit("/", 1)[-1]).lstrip(".") or "_"


def _artifact_folder(name: str) -> str:
    return "/".join(_leaf(part) for part in name.split("/") if part not in {"", ".", ".."})


def _copy_code(target: Path) -> None:
    """Copy the packages that the served model imports: no stages, commands or flows."""
    package = Path(__file__).resolve().parents[2]
    for name in ("core", "audio", "models", "diffusion"):
        shutil.copytree(package / name, target / package.name / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(package / "__init__.py", target / package.name / "__init__.py")
