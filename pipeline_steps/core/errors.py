"""Errors with an exit code. A stage raises one of these; `__main__` turns it into one line and `error.json`.

DVC turns every failing exit code into 255, so whoever needs the code (Prefect, `sonify`) reads `error.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StageError(Exception):
    """A failure a person can act on: what is wrong, with which file or key, and what to do next."""

    reason: str
    action: str = ""
    transient: bool = False
    details: dict[str, object] = field(default_factory=dict)

    exit_code = 1
    kind = "internal"

    def __str__(self) -> str:
        return f"{self.reason} -> {self.action}" if self.action else self.reason

    def as_dict(self) -> dict[str, object]:
        """Plain form written to `error.json`."""
        return {
            "kind": self.kind,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "action": self.action,
            "transient": self.transient,
            "details": self.details,
        }


class ConfigError(StageError):
    """Configuration or usage: a key, a value, a flag."""

    exit_code = 2
    kind = "configuration"


class DataError(StageError):
    """The data as a whole: empty pool, too many bad items, a broken table."""

    exit_code = 3
    kind = "data"


class ResourceError(StageError):
    """Disk, memory, GPU."""

    exit_code = 4
    kind = "resource"


class ServiceError(StageError):
    """A service that is needed and away."""

    exit_code = 5
    kind = "service"


class IntegrityError(StageError):
    """A hash, side-car or fingerprint that does not match; content that must not be loaded."""

    exit_code = 6
    kind = "integrity"


class LockedError(StageError):
    """Another run holds the lock."""

    exit_code = 7
    kind = "locked"
