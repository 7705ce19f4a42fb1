"""Output of git commands, and their failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.git import git, try_git


def test_output_and_failure(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    assert git(tmp_path, "symbolic-ref", "HEAD") == "refs/heads/main"
    with pytest.raises(ConfigError, match="git rev-parse failed in"):
        git(tmp_path, "rev-parse", "--verify", "HEAD")
    assert try_git(tmp_path, "rev-parse", "--verify", "HEAD") is None


def test_git_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="install git"):
        git(tmp_path, "status")
    assert try_git(tmp_path, "status") is None
