"""Where tracking goes and how long it may take: environment variables, the default store, redaction of secrets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pipeline_steps.core.config import SECRET_WORDS
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.project_paths import ProjectPaths

EXPERIMENT = "seeing-sound"
REGISTERED_MODEL = "audio2image"
MODES = ("on", "off", "spool", "strict")

HTTP_TIMEOUT_S = 5
"""Longest answer the uploader waits for, per request, while a stage waits for it."""

SYNC_TIMEOUT_S = 60
"""The same in `sonify sync`, where only a person waits."""

_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")  # to the last @: a password may hold one
_SECRET_WORD = "|".join((*SECRET_WORDS, "credential", "passwd", "private_key", "access_key"))
_SECRET_NAME = re.compile(_SECRET_WORD, re.IGNORECASE)
_ASSIGNED = re.compile(rf"([\w.-]*(?:{_SECRET_WORD})[\w.-]*=)[^\s&;,'\"]+", re.IGNORECASE)  # ?token=..., password=... of libpq
_SECRET_MIN_LENGTH = 6


@dataclass(frozen=True, slots=True)
class TrackingSettings:
    """How this project is tracked.

    Attributes:
        mode: `on`; `off`; `spool` (write to disk only, for machines without a network; `sonify sync` sends it); `strict` (a
            stage whose entries could not be sent exits with 5).
        uri: MLflow tracking URI.
        experiment: MLflow experiment name.
        artifacts: artifact root for the experiment, when the store is a database; empty with a server, which decides.
        deadline_s: longest wait for the uploader at the end of a stage.
    """

    mode: str
    uri: str
    experiment: str
    artifacts: str
    deadline_s: float

    @property
    def is_server(self) -> bool:
        """True when the store is reached over the network."""
        return self.uri.startswith(("http://", "https://"))


def read_settings(layout: ProjectPaths) -> TrackingSettings:
    """Settings from the environment: SONIFY_TRACKING, SONIFY_TRACKING_DEADLINE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.

    A run in a git worktree uses the stores of the project it came from: SONIFY_PROJECT names it.

    Raises:
        ConfigError: unknown mode, a file store (MLflow 3.17 refuses those), or a deadline that is no positive number.
    """
    mode = os.environ.get("SONIFY_TRACKING", "on").strip().lower() or "on"
    if mode not in MODES:
        raise ConfigError(f"SONIFY_TRACKING={mode!r} is unknown", f"use one of {', '.join(MODES)}")
    root = Path(os.environ.get("SONIFY_PROJECT") or layout.root).resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"sqlite:///{root / 'mlflow.db'}"
    scheme = urlsplit(uri).scheme
    if scheme in {"", "file"} or (len(scheme) == 1 and scheme.isalpha()):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={redact(uri)} is a file store, which MLflow no longer supports",
            "unset it (the default is mlflow.db in the project folder), or name a database or server: sqlite:///mlflow.db, "
            "postgresql://..., http://...",
        )
    local = scheme.startswith("sqlite")
    text = os.environ.get("SONIFY_TRACKING_DEADLINE", "120" if local else "20")
    try:
        deadline = float(text)
    except ValueError:
        deadline = 0.0
    if not 0 < deadline < 86_400:
        raise ConfigError(f"SONIFY_TRACKING_DEADLINE={text!r} must be a number of seconds between 0 and 86400")
    return TrackingSettings(
        mode=mode,
        uri=uri,
        experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or EXPERIMENT,
        artifacts="" if scheme in {"http", "https"} else (root / "mlartifacts").as_uri(),
        deadline_s=deadline,
    )


def looks_secret(key: str) -> bool:
    """True when a parameter or variable of this name must not be written down."""
    return _SECRET_NAME.search(key) is not None


def redact(text: str) -> str:
    """`text` without user names and passwords in URLs, values given to secret-looking names (`?token=...`), and the values
    of secret-looking environment variables."""
    text = _ASSIGNED.sub(r"\1***", _USER_INFO.sub("***@", text))
    for name, value in os.environ.items():
        if len(value) >= _SECRET_MIN_LENGTH and looks_secret(name):
            text = text.replace(value, "***")
    return text


def mlflow_environment(timeout_s: int) -> dict[str, str]:
    """What mlflow must find before it is imported: no telemetry, no pickles, short answers, and no retries of its own.

    MLflow repeats a request whose answer got lost, and would so make a run twice; the uploader looks before it repeats.
    """
    return {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout_s),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }


def child_environment(settings: TrackingSettings) -> dict[str, str]:
    """Environment of the uploader: this package on the path, the store's address, few threads."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    few_threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **few_threads, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": settings.uri}
