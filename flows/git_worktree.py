"""Git worktree of a run: an isolated workspace that uses the project's caches.

A worktree below `.runs/worktrees/` is checked out at a commit, and its `params.yaml` is changed by preset and overrides. It
uses the project's DVC cache, the result cache and wheels (`.cache`), and the checkpoints and tracking queues (`.runs`). Results
are committed on the branch `runs/NAME`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flows.dvc_graph import StageNode, link_dvc_cache, overlaps, read_graph
from flows.param_overrides import RunRequest, write_params
from pipeline_steps.core.errors import ConfigError, ResourceError
from pipeline_steps.core.git import git, try_git
from pipeline_steps.core.project_paths import find_root

BRANCH = "runs/"
WORKTREES = ".runs/worktrees"
KEPT_WORKTREES = 3
KEPT_DAYS = 7.0
CHECKOUT_TIMEOUT_S = 6000
AUTHOR = ("-c", "user.name=Seeing Sound flows", "-c", "user.email=flows@localhost")


@dataclass(frozen=True, slots=True)
class RunWorkspace:
    """Folder in which the stages of a run are executed.

    Attributes:
        root: folder with `dvc.yaml`.
        project: working tree of the user; equal to `root` without git.
        commit: checked-out commit; empty without git.
        changes: `key: old -> new` for every parameter that the run changes.
    """

    root: Path
    project: Path
    commit: str = ""
    changes: tuple[str, ...] = ()

    @property
    def isolated(self) -> bool:
        """Whether the run has its own worktree."""
        return self.root != self.project

    def environment(self) -> dict[str, str]:
        """Environment variables for the processes of stages: the project's stores, and `python` of `dvc.yaml` on PATH."""
        variables = {
            "SONIFY_PROJECT": str(self.project),
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "PYTHONUNBUFFERED": "1",
        }
        store = os.environ.get("MLFLOW_TRACKING_URI", "")
        if store.startswith("sqlite:///") and not urlsplit(store).path.startswith("//"):
            variables["MLFLOW_TRACKING_URI"] = f"sqlite:///{self.project / store.removeprefix('sqlite:///')}"
        return variables


def find_project() -> Path:
    """Find the project folder: SONIFY_PROJECT or the working directory, or the nearest parent with `dvc.yaml`.

    Raises:
        ConfigError: there is no such folder.
    """
    start = Path(os.environ.get("SONIFY_PROJECT") or Path.cwd())
    if root := find_root(start):
        return root
    raise ConfigError(f"no dvc.yaml in {start} or its parents", "change to the project folder, or set SONIFY_PROJECT")


def has_git(project: Path) -> bool:
    """Whether the project is in a git repository with a commit."""
    return bool(try_git(project, "rev-parse", "--verify", "HEAD"))


def is_clean(project: Path) -> bool:
    """Whether no tracked file has changes."""
    return not git(project, "status", "--porcelain", "--untracked-files=no")


@contextmanager
def open_workspace(project: Path, name: str, request: RunRequest) -> Iterator[RunWorkspace]:
    """Create the workspace of a run. Its worktree is removed at the end and kept if the run failed.

    Raises:
        ConfigError: a preset or parameter is not valid (no worktree remains), or the request changes parameters of a project
            without git.
    """
    if not has_git(project):
        if request.changes_params:
            raise ConfigError(
                f"{project} is not under git, and parameters can only be set in a worktree", "run: git init, and commit"
            )
        yield RunWorkspace(project, project)
        return
    remove_old_worktrees(project)
    path = project / WORKTREES / safe_name(name)
    commit = git(project, "rev-parse", "--verify", f"{request.revision}^{{commit}}")
    prefix = git(project, "rev-parse", "--show-prefix")
    if path.exists():  # a failed attempt of this run, which is retried under the same name
        _remove(project, path)
    git(project, "worktree", "add", "--detach", "--force", str(path), commit)
    try:
        workspace = _link_shared_paths(project, path / prefix, commit, request)
    except BaseException:
        _remove(project, path)
        raise
    yield workspace
    _remove(project, path)


def _link_shared_paths(project: Path, root: Path, commit: str, request: RunRequest) -> RunWorkspace:
    changes = write_params(root, request)
    for name in (".cache", ".runs"):
        (project / name).mkdir(exist_ok=True)
        (root / name).symlink_to(project / name, target_is_directory=True)
    local = project / ".dvc/config.local"
    if local.is_file():
        shutil.copyfile(local, root / ".dvc/config.local")
    link_dvc_cache(project, root)
    nodes = read_graph(root)
    _link_sources(project, root, nodes)
    return RunWorkspace(root, project, commit, tuple(changes))


def _link_sources(project: Path, root: Path, nodes: Sequence[StageNode]) -> None:
    """Link sources of the project that neither git nor a `.dvc` file tracks (an ignored folder of raw files)."""
    outs = {out for node in nodes for out in node.outs}
    for dep in {dep for node in nodes for dep in node.deps}:
        link, source = root / dep, project / dep
        if not overlaps(dep, outs) and not link.exists() and source.exists() and not Path(f"{source}.dvc").is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source, target_is_directory=source.is_dir())


def restore_outs(workspace: RunWorkspace) -> str:
    """Link the outs of `dvc.lock` from DVC's cache; returns DVC's message about missing outs, else an empty string."""
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "checkout", "--quiet"],
        cwd=workspace.root,
        env={**os.environ, **workspace.environment()},
        capture_output=True,
        text=True,
        timeout=CHECKOUT_TIMEOUT_S,
        check=False,
    )
    return "" if not done.returncode else " ".join((done.stderr or done.stdout).split())[:500]


def commit_results(workspace: RunWorkspace, name: str, message: str, nodes: Sequence[StageNode]) -> str | None:
    """Commit lock file, parameters and reports of the run on the branch `runs/NAME`.

    Returns:
        The branch; the newest run branch if it contains the same files; None if nothing has changed.

    Raises:
        ConfigError: a git command failed.
    """
    root = workspace.root
    results = {"dvc.lock", "params.yaml", *(out for node in nodes for out in node.uncached)}
    present = sorted(path for path in results if (root / path).is_file())
    git(root, "add", "--update")
    if present:
        git(root, "add", "--force", "--", *present)
    if not git(root, "diff", "--cached", "--name-only"):
        return None
    last = last_run_branch(workspace.project)
    if last and git(root, "write-tree") == git(root, "rev-parse", f"{last}^{{tree}}"):
        return last  # same results as the last run, which was not merged
    author = () if try_git(root, "config", "user.name") and try_git(root, "config", "user.email") else AUTHOR
    # Hooks and signatures are meant for the user's own commits.
    options = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgsign=false")
    git(root, *author, *options, "commit", "--quiet", "-m", message)
    branch = BRANCH + safe_name(name)
    if try_git(workspace.project, "rev-parse", "--verify", f"refs/heads/{branch}"):
        branch = f"{branch}-{int(time.time())}"
    git(root, "branch", branch, "HEAD")
    return branch


def last_run_branch(project: Path) -> str | None:
    """Run branch with the newest commit; None if there is none."""
    found = git(
        project, "for-each-ref", "--sort=-committerdate", "--count=1", "--format=%(refname:short)", f"refs/heads/{BRANCH}"
    )
    return found or None


def read_committed(project: Path, revision: str, path: str) -> str | None:
    """Content of a file in a commit, `path` relative to the project; None if it does not exist there."""
    return try_git(project, "show", f"{revision}:./{path}")


def remove_old_worktrees(project: Path, keep: int = KEPT_WORKTREES, days: float = KEPT_DAYS) -> list[str]:
    """Remove worktrees of failed runs beyond the newest `keep` or older than `days`; the caller holds the workspace lock."""
    folder = project / WORKTREES
    if not folder.is_dir():
        return []
    by_age = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    oldest = time.time() - days * 86_400
    outdated = [path for number, path in enumerate(by_age) if number >= keep or path.stat().st_mtime < oldest]
    for path in outdated:
        _remove(project, path)
    git(project, "worktree", "prune")
    return [path.name for path in outdated]


def safe_name(name: str) -> str:
    """Replace characters of `name` that are not valid in a branch and folder name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:80] or "run"


def _remove(project: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # removes links to the project's folders, not their targets
    if path.exists():
        raise ResourceError(f"{path} cannot be removed", "run: git worktree remove --force")
    git(project, "worktree", "prune")
