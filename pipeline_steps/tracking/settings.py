"""Tracking settings: environment variables, the default store, timeouts, redaction of secrets."""

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
CHAMPION, CHALLENGER = "champion", "challenger"
"""Aliases of the registered model."""
MODES = ("on", "off", "queue", "strict")
DEFAULT_STORE = "sqlite:///mlflow.db"
"""Name of the default store, the database of the project, wherever the project lies."""

HTTP_TIMEOUT_S = 5
"""Timeout of one request of the uploader, which a stage waits for at its end."""

SYNC_TIMEOUT_S = 60
"""Timeout of one request of commands and flows, such as `sonify sync`."""

_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")  # to the last @: a password may hold one
_SECRET_WORD = "|".join((*SECRET_WORDS, "credential", "passwd", "private_key", "access_key"))
_SECRET_NAME = re.compile(_SECRET_WORD, re.IGNORECASE)
_ASSIGNED = re.compile(rf"([\w.-]*(?:{_SECRET_WORD})[\w.-]*=)[^\s&;,'\"]+", re.IGNORECASE)  # ?token=..., password=... of libpq
_SECRET_MIN_LENGTH = 6


@dataclass(frozen=True, slots=True)
class TrackingSettings:
    """Tracking settings of a project."""

    # `on`; `off`; `queue` (write to the offline queue only; `sonify sync` uploads it); `strict` (a stage exits with 5
    # when entries could not be uploaded)
    mode: str
    uri: str  # MLflow tracking URI
    store: str  # name of the store in queues: the URI without credentials, or DEFAULT_STORE
    experiment: str  # MLflow experiment name
    artifacts: str  # artifact root of the experiment if the store is a database; empty for a server, which has its own
    deadline_s: float  # longest wait for the uploader at the end of a stage

    @property
    def is_server(self) -> bool:
        """Whether the store is an MLflow server."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def is_missing(self) -> bool:
        """Whether the store is a SQLite file that does not exist: nothing was tracked, and MLflow would create an empty one."""
        return self.uri.startswith("sqlite:///") and not Path(self.uri.removeprefix("sqlite:///")).is_file()


def read_settings(layout: ProjectPaths) -> TrackingSettings:
    """Read SONIFY_TRACKING, SONIFY_TRACKING_DEADLINE, MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME.

    A run in a git worktree or a temporary folder of DVC uses the stores of its project, see `project_root`.

    Raises:
        ConfigError: the mode is unknown, the URI is a file store (MLflow 3.17 refuses those), or the deadline is not a
            positive number.
    """
    mode = os.environ.get("SONIFY_TRACKING", "on").strip().lower() or "on"
    if mode not in MODES:
        raise ConfigError(f"SONIFY_TRACKING={mode!r} is unknown", f"use one of {', '.join(MODES)}")
    root = project_root(layout.root)
    default = f"sqlite:///{root / 'mlflow.db'}"
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or default
    scheme = urlsplit(uri).scheme
    if scheme in {"", "file"} or (len(scheme) == 1 and scheme.isalpha()):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={redact(uri)} is a file store, which MLflow no longer supports",
            "unset it (default: mlflow.db in the project folder) or set a database or server: sqlite:///mlflow.db, "
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
        store=DEFAULT_STORE if uri == default else redact(uri),
        experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME", "").strip() or EXPERIMENT,
        artifacts="" if scheme in {"http", "https"} else (root / "mlartifacts").as_uri(),
        deadline_s=deadline,
    )


def project_root(root: Path) -> Path:
    """Absolute folder of the project whose stores a run in `root` uses.

    It is SONIFY_PROJECT for a run in a git worktree. `dvc exp run --temp` and the queue of DVC run in a folder below
    `.dvc/tmp/exps` that DVC deletes afterwards; they use the project that this `.dvc` belongs to.
    """
    here = Path(os.environ.get("SONIFY_PROJECT") or root).resolve()
    home = next((folder.parents[2] for folder in here.parents if folder.parts[-3:] == (".dvc", "tmp", "exps")), None)
    copy = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), None)
    return here if home is None or copy is None else home / here.relative_to(copy)


def is_secret_name(key: str) -> bool:
    """Whether the value of a parameter or variable of this name must be redacted."""
    return _SECRET_NAME.search(key) is not None


def redact(text: str) -> str:
    """Replace secrets in `text` by `***`.

    Secrets are user names and passwords in URLs, values of secret-looking names (`?token=...`) and values of secret-looking
    environment variables.
    """
    text = _ASSIGNED.sub(r"\1***", _USER_INFO.sub("***@", text))
    for name, value in os.environ.items():
        if len(value) >= _SECRET_MIN_LENGTH and is_secret_name(name):
            text = text.replace(value, "***")
    return text


def mlflow_environment(timeout_s: int) -> dict[str, str]:
    """Environment variables for mlflow, to be set before its import: no telemetry, no pickles, a timeout, no retries.

    MLflow's own retry repeats a request whose response was lost and would create a run twice. The uploader checks first.
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
    """Environment of the uploader: this package on the path, the tracking URI, one thread."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**os.environ, **one_thread, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": settings.uri}
