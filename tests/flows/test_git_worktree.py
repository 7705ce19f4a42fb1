"""Tests of the worktree of a run; the user's working tree stays unchanged."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from flows.dvc_graph import make_plan, read_graph
from flows.dvc_subprocess import run_dvc_stage
from flows.git_worktree import (
    commit_results,
    has_git,
    is_clean,
    last_run_branch,
    open_workspace,
    read_committed,
    remove_old_worktrees,
    restore_outs,
    safe_name,
)
from flows.param_overrides import RunRequest
from pipeline_steps.core.errors import ConfigError
from tests.flows import dvc_project


def snapshot(root: Path) -> dict[str, bytes]:
    skipped = {".git", ".runs", ".cache", "tmp", "cache"}
    files = [path for path in root.rglob("*") if path.is_file() and not skipped & set(path.relative_to(root).parts)]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def run(project: Path, name: str, request: RunRequest) -> str | None:
    with open_workspace(project, name, request) as workspace:
        assert restore_outs(workspace) == ""
        for each in make_plan(workspace.root):
            if each.runs:
                run_dvc_stage(each.node.name, workspace.root, environment=workspace.environment(), on_line=lambda line: None)
        return commit_results(workspace, name, f"Run {name}", read_graph(workspace.root))


def test_run_with_changed_parameters(project: Path) -> None:
    before = snapshot(project)
    branch = run(project, "bold-owl", RunRequest(overrides=("model.seed=3",)))
    assert branch == "runs/bold-owl"
    assert snapshot(project) == before
    assert is_clean(project)
    assert not list((project / ".runs/worktrees").iterdir()), "the worktree was removed"
    assert "bold-owl" not in dvc_project.git(project, "worktree", "list")
    changed = set(dvc_project.git(project, "diff", "--name-only", "main", branch).split())
    assert {"dvc.lock", "params.yaml"} <= changed
    assert all(path in {"dvc.lock", "params.yaml"} or path.startswith("reports/") for path in changed)
    assert last_run_branch(project) == branch
    assert "seed: 3" in (read_committed(project, branch, "params.yaml") or "")
    assert read_committed(project, branch, "nothing.json") is None

    # Equal results create no second branch.
    assert run(project, "second", RunRequest(overrides=("model.seed=3",))) == branch
    assert "second" not in dvc_project.git(project, "branch")

    # Another clone gets these results from the cache without running a stage.
    dvc_project.git(project, "merge", "--quiet", branch)
    dvc_project.dvc(project, "checkout", "--quiet")
    assert not any(each.runs for each in make_plan(project))
    assert (project / "out/model.txt").read_bytes() != before["out/model.txt"]

    # The default parameters again: nothing to commit.
    assert run(project, "calm-owl", RunRequest()) is None


def test_invalid_parameters_leave_no_worktree(project: Path) -> None:
    with (
        pytest.raises(ConfigError, match="did you mean model"),
        open_workspace(project, "x", RunRequest(overrides=("modle.a=1",))),
    ):
        raise AssertionError("not reached")
    assert not list((project / ".runs/worktrees").glob("*"))
    with pytest.raises(ConfigError, match="rev-parse"), open_workspace(project, "x", RunRequest(revision="no-such-branch")):
        raise AssertionError("not reached")


def test_worktrees_of_failed_runs_are_kept_for_a_while(project: Path) -> None:
    for number in range(5):
        with pytest.raises(ZeroDivisionError), open_workspace(project, f"failed-{number}", RunRequest()):
            raise ZeroDivisionError
        folder = project / f".runs/worktrees/failed-{number}"
        os.utime(folder, (time.time() - 1000 + number, time.time() - 1000 + number))
    names = {path.name for path in (project / ".runs/worktrees").iterdir()}
    assert names == {"failed-1", "failed-2", "failed-3", "failed-4"}, "the next run removed the oldest"
    assert remove_old_worktrees(project, keep=9, days=1.0) == []
    assert len(remove_old_worktrees(project, keep=9, days=1e-5)) == 4
    assert (project / ".runs").is_dir(), "a link in a worktree is removed, not what it points to"


def test_failed_run_is_retried_under_its_name(project: Path) -> None:
    for _ in range(2):
        with suppress(ZeroDivisionError), open_workspace(project, "again", RunRequest()) as workspace:
            assert not (workspace.root / "left.txt").exists()
            (workspace.root / "left.txt").write_text("of the first attempt")
            raise ZeroDivisionError
    assert (project / ".runs/worktrees/again/left.txt").exists()
    with open_workspace(project, "again", RunRequest()) as workspace:
        assert not (workspace.root / "left.txt").exists()


def test_sources_outside_git_are_linked(project: Path) -> None:
    (project / ".gitignore").write_text((project / ".gitignore").read_text() + "/raw\n")
    (project / "raw").mkdir()
    (project / "raw/a.txt").write_text("a")
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("deps: [source.txt, work.py]", "deps: [source.txt, raw, work.py]"))
    dvc_project.commit(project)
    with open_workspace(project, "linked", RunRequest()) as workspace:
        assert (workspace.root / "raw").is_symlink()
        assert (workspace.root / "raw/a.txt").read_text() == "a"
        plan = make_plan(workspace.root)
        assert "raw" in plan[0].why
        done = run_dvc_stage(plan[0].node.name, workspace.root, environment=workspace.environment(), on_line=lambda line: None)
        assert done.outcome == "ran"


def test_project_without_git(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "dvc.yaml").write_text("stages: {}\n")
    assert not has_git(folder)
    with open_workspace(folder, "x", RunRequest()) as workspace:
        assert workspace.root == workspace.project == folder
    with pytest.raises(ConfigError, match="not under git"), open_workspace(folder, "x", RunRequest(seed=1)):
        raise AssertionError("not reached")


def test_runs_use_the_stores_of_the_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline_steps.core.project_paths import ProjectPaths
    from pipeline_steps.tracking.settings import read_settings

    with open_workspace(project, "stores", RunRequest()) as workspace:
        environment = workspace.environment()
        monkeypatch.setenv("SONIFY_PROJECT", environment["SONIFY_PROJECT"])
        settings = read_settings(ProjectPaths(workspace.root))
        assert settings.uri == f"sqlite:///{project / 'mlflow.db'}"
        assert settings.artifacts == (project / "mlartifacts").as_uri()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///own.db")
        assert workspace.environment()["MLFLOW_TRACKING_URI"] == f"sqlite:///{project / 'own.db'}"
        assert (workspace.root / ".cache").resolve() == project / ".cache"
        assert (workspace.root / ".runs").resolve() == project / ".runs"


def test_safe_name() -> None:
    assert safe_name("bold owl/../x") == "bold-owl-x"
    assert safe_name("///") == "run"
