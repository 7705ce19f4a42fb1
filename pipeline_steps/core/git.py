"""Output of git commands."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pipeline_steps.core.errors import ConfigError

TIMEOUT_SECONDS = 600.0


def git(folder: Path, *arguments: str, timeout_s: float = TIMEOUT_SECONDS) -> str:
    """Output of a git command in `folder`, without white space at its ends.

    Raises:
        ConfigError: git is not installed, takes longer than `timeout_s`, or fails.
    """
    try:
        done = subprocess.run(
            ["git", *arguments],  # noqa: S607 - git is found on PATH as everywhere else
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"git {arguments[0]}: {error}", "install git, or see sonify doctor") from error
    if done.returncode:
        message = " ".join((done.stderr or done.stdout).split())
        raise ConfigError(f"git {arguments[0]} failed in {folder}: {message}", "see sonify doctor")
    return done.stdout.strip()


def try_git(folder: Path, *arguments: str, timeout_s: float = TIMEOUT_SECONDS) -> str | None:
    """Output of a git command in `folder`; None if it fails or git is not installed."""
    try:
        return git(folder, *arguments, timeout_s=timeout_s)
    except ConfigError:
        return None
