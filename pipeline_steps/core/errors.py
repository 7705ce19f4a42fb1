"""Errors with an exit code, and the file `error.json` to which a stage writes its error.

A stage raises a `StageError`; `__main__` prints it as one line and writes `error.json`. DVC reports exit code 255 for every
failure, so callers of DVC (Prefect flows, `sonify`) read the code from that file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

EXIT_CODES = {
    0: "done",
    1: "internal error, with a traceback; or a question was answered with no",
    2: "configuration or usage: a key, value or option; an id, code or file that does not exist",
    3: "data: an empty or unusable pool, a missing or broken table, a stage that has not run, an unknown model version",
    4: "resource: disk, memory, GPU",
    5: "service: a server is unavailable",
    6: "integrity: bytes differ from their recorded hash",
    7: "locked: another process is working in the project",
    130: "interrupted by Ctrl+C",
    143: "terminated",
}
"""Exit codes of stages, of `sonify` and of `python -m flows.*`, with their meaning."""

ERROR_FILE = "error.json"
"""File in the project root; a run of a stage removes the file of the run before."""


def suggest_name(name: str, choices: Iterable[str], otherwise: str = "") -> str:
    """Action for an unknown name: the closest of `choices`, else `otherwise`, else the list of them."""
    names = list(choices)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else otherwise or f"choose one of {', '.join(names) or 'none'}"


@dataclass
class StageError(Exception):
    """A failure that the user can act on: what is wrong with which file or key, and the next action."""

    reason: str
    action: str = ""
    transient: bool = False
    details: dict[str, object] = field(default_factory=dict)

    exit_code = 1
    kind = "internal"
    stage = ""
    """Stage that failed; set on errors that were loaded from a file."""

    def __str__(self) -> str:
        return f"{self.reason} -> {self.action}" if self.action else self.reason

    def as_dict(self) -> dict[str, object]:
        """JSON form, as in `error.json`."""
        return {"kind": self.kind, "exit_code": self.exit_code, **asdict(self)}


class ConfigError(StageError):
    """Configuration or usage: a key, a value, a flag."""

    exit_code = 2
    kind = "configuration"


class DataError(StageError):
    """The data cannot be used: empty pool, too many bad items, a broken table."""

    exit_code = 3
    kind = "data"


class ResourceError(StageError):
    """Disk, memory, GPU."""

    exit_code = 4
    kind = "resource"


class ServiceError(StageError):
    """A required service is unavailable."""

    exit_code = 5
    kind = "service"


class IntegrityError(StageError):
    """A hash, side-car or fingerprint does not match; the content must not be loaded."""

    exit_code = 6
    kind = "integrity"


class LockedError(StageError):
    """Another process has the lock."""

    exit_code = 7
    kind = "locked"


def error_from_dict(value: Mapping[str, Any]) -> StageError:
    """Error of the class that belongs to `kind`; missing fields get defaults.

    Raises:
        ValueError: `exit_code` is not a number.
    """
    kind, details = str(value.get("kind", "internal")), value.get("details")
    classes = (ConfigError, DataError, ResourceError, ServiceError, IntegrityError, LockedError)
    error_class = next((candidate for candidate in classes if candidate.kind == kind), StageError)
    error = error_class(
        str(value.get("reason") or kind),
        str(value.get("action", "")),
        bool(value.get("transient", False)),
        details if isinstance(details, dict) else {},
    )
    error.kind, error.stage = kind, str(value.get("stage", ""))
    error.exit_code = int(value.get("exit_code", error_class.exit_code))
    return error


def load_error_file(folder: Path) -> StageError | None:
    """Error that a stage wrote to `error.json` of a project; None if there is no valid file.

    `reason` is the last line of the written reason, because the reason of an internal error is a traceback.
    """
    try:
        value = json.loads((folder / ERROR_FILE).read_text(encoding="utf-8"))
        error = error_from_dict(value)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    error.reason = (error.reason.strip().splitlines() or ["unknown"])[-1]
    return error
