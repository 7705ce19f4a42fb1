"""What a stage says about its run.

    from pipeline_steps import tracking

    def run(config: Config, layout: Layout) -> StageReport:
        with tracking.run("train", layout, config, inputs=[layout.pairs, layout.media], resume_key=digest) as tracker:
            tracker.log_metrics({"train/loss": 0.3}, step=10)
            tracker.log_image("samples/grid", grid, step=10)          # uint8 [H, W, 3]
            tracker.log_audio("test/dog", samples, 48_000)            # float32 [T]
            tracker.log_artifact(layout.report("train"), folder="reports")
            tracker.log_model(layout.model)                           # once the folder is whole

Parameters (the whole section), tags (git commit, stage, `dvc.inputs`) and the data sets named by `inputs` are logged by
`run` itself. Every call appends to a spool on local disk and returns; a child process carries the spool to MLflow while the
stage works, and is given a bounded time to finish at the end. A server that is away, slow or broken therefore costs nothing
but that bounded wait: what could not be sent stays in the spool, one warning is printed, and `sonify sync` sends it later
into the same run. Same `resume_key` after a crash: same MLflow run.
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
import numpy.typing as npt

from pipeline_steps.core.atomic import link_or_copy
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.errors import ServiceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.offline_queue import FINISHED, OfflineQueue, open_spool
from pipeline_steps.tracking.client.system_metrics import SystemMetricsMonitor
from pipeline_steps.tracking.lineage import dvc_digests
from pipeline_steps.tracking.settings import TrackingSettings, child_environment, looks_secret, read_settings, redact

log = logging.getLogger(__name__)

MAX_PARAM_LENGTH = 6000
MAX_KEY_LENGTH = 250
INTERRUPTED_WAIT_S = 5.0


class NoOpTracker:
    """Says nothing: tracking is off. The interface is `Tracker`'s."""

    @property
    def run_id(self) -> str:
        """MLflow run id; always empty here."""
        return ""

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters, nested mappings as dotted keys. Values of secret-looking keys are replaced by `***`."""

    def log_tags(self, values: Mapping[str, Any]) -> None:
        """Tags of the run."""

    def log_metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Numbers at a step; nested mappings become `outer/inner`. NaN and infinity are dropped and counted."""

    def log_image(self, key: str, image: npt.NDArray[np.uint8], step: int = 0) -> None:
        """A picture, uint8 [H, W, 3] or [H, W], at a step; MLflow shows equal keys as a series."""

    def log_audio(self, name: str, samples: npt.NDArray[np.float32], rate: int) -> None:
        """A sound, float32 [T] in [-1, 1] at `rate` Hz, as WAV below `audio/`; MLflow plays it."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A file or folder, below `folder` in the run's artifacts."""

    def log_input(self, name: str, digest: str, path: str, context: str, profile: Mapping[str, Any] | None = None) -> None:
        """A data set that the run read: `digest` is its DVC md5, `path` is relative to the project."""

    def log_model(self, folder: Path) -> None:
        """The exported model: logged as a pyfunc, registered as `audio2image`, alias `challenger`."""

    def log_model_metrics(self, folder: Path, values: Mapping[str, Any], dataset: Path | None = None) -> None:
        """Numbers about the model in `folder`, measured on `dataset`; attached to the logged model with those bytes."""


class Tracker(NoOpTracker):
    """Writes to a spool; see the module's docstring. Failing writes are counted and never stop a stage."""

    def __init__(self, spool: OfflineQueue, layout: ProjectPaths) -> None:
        self._spool = spool
        self._layout = layout
        self._lock = threading.Lock()
        self._lost = 0
        self._problem = ""
        # A run that goes on from a checkpoint repeats the steps behind it: they are in the spool already.
        self._said = spool.last_steps()
        self.dropped = 0
        """Metrics that were NaN or infinite."""

    @property
    def run_id(self) -> str:
        """MLflow run id, empty until the uploader has created the run."""
        return self._spool.state().run_id

    def next_system_step(self) -> int:
        """Step of the next machine sample: they are numbered on through a resumed run."""
        return 1 + max((step for key, step in self._said.items() if key.startswith("system/")), default=-1)

    def log_params(self, values: Mapping[str, Any]) -> None:
        clean = {_key(key): _harmless(key, value)[:MAX_PARAM_LENGTH] for key, value in _flatten(values, ".").items()}
        if clean:
            self._append("params", values=clean)

    def log_tags(self, values: Mapping[str, Any]) -> None:
        self._append("tags", values={_key(key): _harmless(key, value) for key, value in values.items()})

    def log_metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        numbers = {key: value for key, value in self._numbers(values).items() if step > self._said.get(key, -1)}
        if numbers:
            self._append("metrics", values=numbers, step=int(step))

    def log_image(self, key: str, image: npt.NDArray[np.uint8], step: int = 0) -> None:
        if image.dtype != np.uint8 or image.ndim not in {2, 3}:
            raise ValueError(f"picture {key!r} must be uint8 [H, W, 3] or [H, W], got {image.dtype} {image.shape}")
        from PIL import Image

        if step <= self._said.get(_key(key), -1):
            return
        with self._guard():
            folder = self._spool.new_folder()
            # The name MLflow's picture grid reads, with the spool's number in place of its random id: a retry overwrites.
            stem = f"{_key(key).replace('/', '~')}+step+{int(step)}+timestamp+{time.time_ns() // 1_000_000}+{folder.name}"
            path = folder / f"{stem}.png"
            Image.fromarray(image).save(path, format="PNG", compress_level=1)
            self._append("image", key=_key(key), step=int(step), file=self._spool.name_of(path))

    def log_audio(self, name: str, samples: npt.NDArray[np.float32], rate: int) -> None:
        if samples.ndim != 1:
            raise ValueError(f"sound {name!r} must be mono [T], got shape {samples.shape}")
        import soundfile

        with self._guard():
            path = self._spool.new_folder() / f"{_leaf(name)}.wav"
            soundfile.write(path, np.clip(samples, -1.0, 1.0), rate, subtype="PCM_16", format="WAV")
            self._append("artifact", file=self._spool.name_of(path), folder=_folder(f"audio/{name}", drop=1))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        with self._guard():
            copy = self._spool.new_folder() / _leaf(path.name)
            _copy(path, copy, link=False)
            self._append("artifact", file=self._spool.name_of(copy), folder=_folder(folder))

    def log_input(self, name: str, digest: str, path: str, context: str, profile: Mapping[str, Any] | None = None) -> None:
        self._append("input", name=name, digest=digest, path=path, context=context, profile=dict(profile or {}))

    def log_model(self, folder: Path) -> None:
        with self._guard():
            copy = self._spool.new_folder()
            _copy(folder, copy / "model", link=True)
            _copy_code(copy / "code")
            digest = dvc_digests.hash_path(copy / "model")
            path, tags = dvc_digests.relative(self._layout, folder), dvc_digests.model_tags(self._layout, folder)
            self._append("model", file=self._spool.name_of(copy), digest=digest, path=path, tags=tags)

    def log_model_metrics(self, folder: Path, values: Mapping[str, Any], dataset: Path | None = None) -> None:
        numbers = self._numbers(values)
        if not numbers:
            return
        with self._guard():
            data: dict[str, str] = {}
            if dataset is not None:
                data = {
                    "name": dvc_digests.relative(self._layout, dataset),
                    "digest": dvc_digests.dvc_digest(self._layout, dataset)[0],
                }
            self._append("model_metrics", digest=dvc_digests.dvc_digest(self._layout, folder)[0], values=numbers, dataset=data)

    def close(self, status: str) -> None:
        """Write the last entry; `status` is one of MLflow's FINISHED, FAILED, KILLED."""
        if self.dropped:
            self._append("tags", values={"metrics.dropped_nonfinite": str(self.dropped)})
            log.warning("tracking: %d metric values were NaN or infinite and were left out", self.dropped)
        self._append("end", status=status)
        if self._lost:
            log.warning("tracking: %d entries could not be written to %s: %s", self._lost, self._spool.folder, self._problem)

    def _numbers(self, values: Mapping[str, Any]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for key, value in _flatten(values, "/").items():
            if not isinstance(value, (bool, int, float, np.number, np.bool_)):
                continue
            number = float(value)
            if math.isfinite(number):
                numbers[_key(key)] = number
            else:  # MLflow would store infinity as 1.8e308
                self.dropped += 1
        return numbers

    def _append(self, kind: str, **values: Any) -> None:
        with self._guard():
            self._spool.append(kind, **values)

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """A full disk or a vanished file costs the entry, not the stage."""
        try:
            yield
        except OSError as error:
            with self._lock:
                self._lost += 1
                self._problem = str(error)


class _UploaderProcess:
    """The child process that carries the spool to MLflow. It lives as long as the pipe to it is open."""

    def __init__(self, settings: TrackingSettings, spool: OfflineQueue) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        try:
            with (spool.folder / "uploader.log").open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pipeline_steps.tracking.client.uploader", str(spool.folder.resolve())],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=child_environment(settings),
                    start_new_session=True,  # Ctrl+C is for the stage; the uploader sees the pipe close
                )
        except OSError as error:
            log.warning("tracking: the uploader could not be started (%s); entries stay in the spool", error)

    def finish(self, seconds: float) -> None:
        """Tell it to send what is left, wait at most `seconds`, then end it."""
        process = self._process
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.close()
        except OSError:
            log.debug("tracking: the uploader had gone before it was told to finish")
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def run(
    stage: str,
    layout: ProjectPaths,
    config: StageConfig,
    *,
    inputs: Sequence[Path] = (),
    tags: Mapping[str, Any] | None = None,
    resume_key: str | None = None,
) -> Iterator[NoOpTracker]:
    """Track one run of a stage.

    Args:
        stage: stage name; the name of the MLflow run.
        layout: the project.
        config: the stage's section; logged as parameters.
        inputs: outs of earlier stages that this stage reads; logged as data sets with their DVC md5 as digest.
        tags: further tags.
        resume_key: runs of the same stage and key are one MLflow run until one of them finishes.

    Raises:
        ConfigError: the tracking address is a file store, or a tracking variable makes no sense.
        ServiceError: in strict mode, when entries could not be sent.
    """
    settings = read_settings(layout)
    if settings.mode == "off":
        yield NoOpTracker()
        return
    header = {"uri": redact(settings.uri), "name": stage, "tags": {key: _harmless(key, v) for key, v in (tags or {}).items()}}
    try:
        spool = open_spool(layout, stage, resume_key, header)
    except OSError as error:
        log.warning("tracking: no spool can be written (%s); this run is not tracked", error)
        yield NoOpTracker()
        return
    tracker = Tracker(spool, layout)
    uploader = _UploaderProcess(settings, spool) if settings.mode != "spool" else None
    monitor = SystemMetricsMonitor(tracker.log_metrics, first_step=tracker.next_system_step())
    tracker._append("start")
    _log_start(tracker, layout, stage, config, inputs)
    monitor.start()
    status, patience = "FAILED", settings.deadline_s
    try:
        yield tracker
        status = FINISHED
    except Exception:
        raise
    except BaseException:  # interrupted: a person or a scheduler waits for the end
        status, patience = "KILLED", min(patience, INTERRUPTED_WAIT_S)
        raise
    finally:
        monitor.stop()
        tracker.close(status)
        left = 0
        if uploader is not None:
            uploader.finish(patience)
            left = _settle(spool, settings)
    if left and settings.mode == "strict":
        raise ServiceError(
            f"{left} tracking entries could not be sent to {redact(settings.uri)}", "sonify sync", transient=True
        )


def _log_start(tracker: Tracker, layout: ProjectPaths, stage: str, config: StageConfig, inputs: Sequence[Path]) -> None:
    params = config.model_dump(mode="json")
    tracker.log_params(params)
    digests: dict[str, str] = {}
    checked = "hashed"
    for path in inputs:
        name = dvc_digests.relative(layout, path)
        try:
            digests[name], checked = dvc_digests.dvc_digest(layout, path)
        except OSError as error:
            log.warning("tracking: input %s has no digest (%s)", name, error)
            continue
        context = "training" if stage == "train" else "evaluation" if stage == "evaluate" else stage
        tracker.log_input(name, digests[name], name, context)
    tags = {**dvc_digests.git_tags(layout), "dvc.stage": os.environ.get("DVC_STAGE", stage), "dvc.digest_source": checked}
    flow_run = os.environ.get("PIPELINE_FLOW_RUN_ID")
    tags |= {"flow_run_id": flow_run} if flow_run else {}
    tags |= {"dvc.inputs": dvc_digests.inputs_digest(digests, params), "params.digest": dvc_digests.inputs_digest({}, params)}
    tracker.log_tags(tags)


def _settle(spool: OfflineQueue, settings: TrackingSettings) -> int:
    """After the uploader: prune what is wholly sent, or print the one warning. Returns the number of entries left."""
    left = spool.unsent()
    state = spool.state()
    if not left:
        if state.ended == FINISHED:
            spool.prune()
        return 0
    reason = state.problem or "no answer in time"
    print(
        f"tracking: {left} entries not sent to {redact(settings.uri)} ({reason}); kept in {spool.folder}; later: sonify sync",
        file=sys.stderr,
        flush=True,
    )
    return left


def _flatten(values: Mapping[str, Any], separator: str, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat |= _flatten(value, separator, name)
        else:
            flat[name] = value
    return flat


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _harmless(key: str, value: Any) -> str:
    """A value as text that may be written down: no text under a secret-looking name. A number is no secret (`tokens: 8`)."""
    return "***" if isinstance(value, str) and value and looks_secret(key) else redact(_plain(value))


def _key(key: str) -> str:
    """A key MLflow accepts: letters, digits, `_-. /`; no `..`, no leading slash."""
    clean = re.sub(r"[^A-Za-z0-9_\-. /]", "_", key)[:MAX_KEY_LENGTH]
    return "/".join(part for part in clean.split("/") if part not in {"", ".", ".."}) or "_"


def _leaf(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", name.rsplit("/", 1)[-1]).lstrip(".") or "_"


def _folder(name: str, drop: int = 0) -> str:
    parts = [_leaf(part) for part in name.split("/") if part not in {"", ".", ".."}]
    return "/".join(parts[: len(parts) - drop] if drop else parts)


def _copy(source: Path, target: Path, link: bool) -> None:
    """Copy a file or folder. `link` makes hard links where it can: exports are replaced by rename, never written in place."""
    copy_file = link_or_copy if link else shutil.copyfile
    if source.is_dir():
        shutil.copytree(source, target, copy_function=copy_file)
    else:
        copy_file(source, target)


def _copy_code(target: Path) -> None:
    """The part of this package that draws: without stages, commands and flows."""
    package = Path(__file__).resolve().parents[2]
    for name in ("__init__.py", "core", "audio", "models", "diffusion", "tracking"):
        source, destination = package / name, target / package.name / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, destination, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, destination)
