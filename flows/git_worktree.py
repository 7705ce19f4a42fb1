"""Where a run happens: its own git worktree with the project's DVC cache, so that the working tree is never touched.

A worktree below `.runs/worktrees/` at a commit, with `params.yaml` = preset + overrides. It shares DVC's cache, the memo and
the wheels (`.cache`), training checkpoints and the tracking spool (`.runs`). Results go on the branch `runs/NAME`.
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

from flows.dvc_graph import StageNode, read_graph, share_cache
from flows.param_overrides import RunRequest, write_params
from pipeline_steps.core.errors import ConfigError, ResourceError
from pipeline_steps.core.git import git, try_git

BRANCH = "runs/"
WORKTREES = ".runs/worktrees"
KEPT_WORKTREES = 3
KEPT_DAYS = 7.0
CHECKOUT_TIMEOUT_S = 6000
AUTHOR = ("-c", "user.name=Seeing Sound flows", "-c", "user.email=flows@localhost")


@dataclass(frozen=True, slots=True)
class RunWorkspace:
    """A folder to run stages in.

    Attributes:
        root: holds `dvc.yaml`.
        project: the person's own working tree; the same folder when there is no git.
        commit: what was checked out; empty without git.
        changes: `key: old -> new` for every parameter the run sets.
    """

    root: Path
    project: Path
    commit: str = ""
    changes: tuple[str, ...] = ()

    @property
    def isolated(self) -> bool:
        """True when the run has a worktree of its own."""
        return self.root != self.project

    def environment(self) -> dict[str, str]:
        """What a stage's process needs to know: whose stores to use. Nothing here changes a result."""
        known = {"SONIFY_PROJECT": str(self.project), "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `python` of dvc.yaml is this one
        store = os.environ.get("MLFLOW_TRACKING_URI", "")
        if store.startswith("sqlite:///") and not urlsplit(store).path.startswith("//"):
            known["MLFLOW_TRACKING_URI"] = f"sqlite:///{self.project / store.removeprefix('sqlite:///')}"
        return {**known, "PATH": path, "PYTHONUNBUFFERED": "1"}


def find_project() -> Path:
    """The project folder: SONIFY_PROJECT, or the nearest folder at or above this one that holds `dvc.yaml`.

    Raises:
        ConfigError: there is none.
    """
    start = Path(os.environ.get("SONIFY_PROJECT") or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file():
            return folder
    raise ConfigError(f"no dvc.yaml at or above {start}", "start in the project folder, or set SONIFY_PROJECT")


def has_git(project: Path) -> bool:
    """Whether the project lies in a git repository with a commit."""
    return bool(try_git(project, "rev-parse", "--verify", "HEAD"))


def is_clean(project: Path) -> bool:
    """Whether tracked files are as committed."""
    return not git(project, "status", "--porcelain", "--untracked-files=no")


@contextmanager
def open_workspace(project: Path, name: str, request: RunRequest) -> Iterator[RunWorkspace]:
    """A workspace for one run; a worktree is removed at the end, and kept when the run failed.

    Raises:
        ConfigError: a parameter or preset that does not exist or is out of bounds (nothing is left behind), or a request to
            change parameters in a project without git.
    """
    if not has_git(project):
        if request.changes_params:
            raise ConfigError(f"{project} is not under git, and parameters can only be set in a worktree", "git init, commit")
        yield RunWorkspace(project, project)
        return
    remove_old_worktrees(project)
    path = project / WORKTREES / safe_name(name)
    commit = git(project, "rev-parse", "--verify", f"{request.revision}^{{commit}}")
    prefix = git(project, "rev-parse", "--show-prefix")
    if path.exists():  # of a failed attempt of this run, which somebody starts again under the same name
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
    share_cache(project, root)
    nodes = read_graph(root)
    _link_sources(project, root, nodes)
    return RunWorkspace(root, project, commit, tuple(changes))


def _link_sources(project: Path, root: Path, nodes: Sequence[StageNode]) -> None:
    """Sources that neither git nor a `.dvc` file carries (an ignored folder of raw files) are the project's own."""
    outs = {out for node in nodes for out in node.outs}
    for dep in {dep for node in nodes for dep in node.deps}:
        here, there = root / dep, project / dep
        made = any(dep == out or Path(out) in Path(dep).parents or Path(dep) in Path(out).parents for out in outs)
        if not made and not here.exists() and there.exists() and not Path(f"{there}.dvc").is_file():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.symlink_to(there, target_is_directory=there.is_dir())


def restore_outs(workspace: RunWorkspace) -> str:
    """Link what `dvc.lock` names from the cache into the worktree; returns DVC's complaint about what is not there, if any."""
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
    """Commit lock file, parameters and reports of the run on `runs/NAME`; None when nothing differs from where it began.

    When the newest run branch holds exactly these files already, it is that branch.

    Raises:
        ConfigError: git refuses.
    """
    root = workspace.root
    kept = {"dvc.lock", "params.yaml", *(out for node in nodes for out in node.uncached)}
    present = sorted(path for path in kept if (root / path).is_file())
    git(root, "add", "--update")
    if present:
        git(root, "add", "--force", "--", *present)
    if not git(root, "diff", "--cached", "--name-only"):
        return None
    last = last_run_branch(workspace.project)
    if last and git(root, "write-tree") == git(root, "rev-parse", f"{last}^{{tree}}"):
        return last  # the same results again: a schedule whose runs nobody merged
    author = AUTHOR if not _has_author(root) else ()
    # A person's hooks and signature are for what a person commits.
    quiet = ("-c", "core.hooksPath=/dev/null", "-c", "commit.gpgsign=false")
    git(root, *author, *quiet, "commit", "--quiet", "-m", message)
    branch = BRANCH + safe_name(name)
    if _exists(workspace.project, branch):
        branch = f"{branch}-{int(time.time())}"
    git(root, "branch", branch, "HEAD")
    return branch


def last_run_branch(project: Path) -> str | None:
    """The run branch with the newest commit."""
    found = git(
        project, "for-each-ref", "--sort=-committerdate", "--count=1", "--format=%(refname:short)", f"refs/heads/{BRANCH}"
    )
    return found or None


def read_committed(project: Path, revision: str, path: str) -> str | None:
    """A file of a commit, `path` relative to the project; None when it is not in it."""
    return try_git(project, "show", f"{revision}:./{path}")


def remove_old_worktrees(project: Path, keep: int = KEPT_WORKTREES, days: float = KEPT_DAYS) -> list[str]:
    """Remove worktrees of failed runs beyond the newest `keep`, and those older than `days`. Call it holding the lock."""
    folder = project / WORKTREES
    if not folder.is_dir():
        return []
    by_age = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    oldest = time.time() - days * 86_400
    gone = [path for number, path in enumerate(by_age) if number >= keep or path.stat().st_mtime < oldest]
    for path in gone:
        _remove(project, path)
    git(project, "worktree", "prune")
    return [path.name for path in gone]


def safe_name(name: str) -> str:
    """`name` as a branch and folder name: letters, digits, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:80] or "run"


def _remove(project: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # takes links to the project's folders away, not what they point to
    if path.exists():
        raise ResourceError(f"{path} cannot be removed", "remove it by hand: git worktree remove --force")
    git(project, "worktree", "prune")


def _has_author(root: Path) -> bool:
    return bool(try_git(root, "config", "user.name") and try_git(root, "config", "user.email"))


def _exists(project: Path, branch: str) -> bool:
    return bool(try_git(project, "rev-parse", "--verify", f"refs/heads/{branch}"))
