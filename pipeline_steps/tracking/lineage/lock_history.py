"""Lineage of a model: the `dvc.lock` with which it was made, found in git's history by the model's md5.

A stage runs before its results are committed. The commit in an MLflow run is therefore older than the lock with its outs. The
lock is found by content: the first commit whose lock contains the md5, or the work tree.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.git import try_git
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.lineage.dvc_digests import hash_path, inputs_digest, lock_outs, parse_lock

LOCK = "dvc.lock"
CODE = "pipeline_steps/"
MAX_COMMITS = 5000


@dataclass(frozen=True, slots=True)
class LockSnapshot:
    """A version of `dvc.lock`; `commit` is empty for the work tree."""

    commit: str
    content: Mapping[str, Any]

    @property
    def where(self) -> str:
        """Location of the lock for messages."""
        return f"commit {self.commit[:12]}" if self.commit else "the work tree (not committed)"


@dataclass(frozen=True, slots=True)
class StageProvenance:
    """One stage of a lineage.

    Attributes:
        stage: name of the stage.
        reads, writes, code: inputs, outs and source files with DVC md5.
        params: parameters of the stage.
        raw: inputs that no stage writes.
    """

    stage: str
    reads: Mapping[str, str]
    writes: Mapping[str, str]
    code: Mapping[str, str]
    params: Mapping[str, Any]
    raw: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        fields = asdict(self)
        return fields | {"params_digest": inputs_digest({}, fields.pop("params"))}


def iter_lock_history(layout: ProjectPaths, holding: str = "") -> Iterator[LockSnapshot]:
    """Yield every lock of the project: commits of all branches, oldest first, then the work tree.

    Locks that cannot be parsed are skipped. With `holding`, only locks whose text contains it are parsed.
    """
    listed = try_git(layout.root, "log", "--all", "--reverse", f"--max-count={MAX_COMMITS}", "--format=%H", "--", LOCK) or ""
    for commit in listed.split():
        text = try_git(layout.root, "show", f"{commit}:./{LOCK}")
        if text and holding in text:
            try:
                yield LockSnapshot(commit, parse_lock(text, f"{LOCK} of {commit[:12]}"))
            except ConfigError:
                continue
    path = layout.root / LOCK
    if path.is_file() and holding in path.read_text(encoding="utf-8", errors="replace"):
        yield LockSnapshot("", parse_lock(path.read_text(encoding="utf-8"), str(path)))


def find_lock(layout: ProjectPaths, path: str, md5: str, commit: str = "") -> LockSnapshot:
    """Find the first lock in which the out `path` has this md5.

    Args:
        layout: paths of the project.
        path: out, relative to the project.
        md5: DVC md5 of the out.
        commit: preferred commit.

    Raises:
        DataError: no lock contains it (made outside `dvc repro`, or its commit is not in this clone).
    """
    found = [lock for lock in iter_lock_history(layout, md5) if lock_outs(lock.content).get(path) == md5]
    if not found:
        raise DataError(
            f"no dvc.lock in this repository contains {path} with md5 {md5}",
            f"git fetch --all{f'; it was made at or after commit {commit[:12]}' if commit else ''}",
        )
    return next((lock for lock in found if lock.commit and lock.commit == commit), found[0])


def stage_lineage(lock: Mapping[str, Any], target: str) -> list[StageProvenance]:
    """Stages that the out `target` depends on, in order, and the stages that read it. Pure.

    Raises:
        DataError: no stage writes `target`.
    """
    stages: Mapping[str, Any] = lock["stages"]
    made_by = {path: name for name, stage in stages.items() for path in _digests(stage.get("outs"))}
    if target not in made_by:
        raise DataError(f"dvc.lock has no out {target}", "run: dvc repro")
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        for path in _digests(stages[name].get("deps")):
            if path in made_by and made_by[path] != name:
                visit(made_by[path])
        if name not in order:
            order.append(name)

    visit(made_by[target])
    for name in sorted(name for name, stage in stages.items() if target in _digests(stage.get("deps"))):
        visit(name)
    return [_stage_provenance(name, stages[name], made_by) for name in order]


def raw_data(lock: Mapping[str, Any]) -> dict[str, str]:
    """Path -> DVC md5 of inputs that no stage writes, without code. Pure."""
    outs = lock_outs(lock)
    deps = {path: md5 for stage in lock["stages"].values() for path, md5 in _digests(stage.get("deps")).items()}
    return {path: md5 for path, md5 in deps.items() if path not in outs and not path.startswith(CODE)}


def _stage_provenance(name: str, stage: Mapping[str, Any], made_by: Mapping[str, str]) -> StageProvenance:
    deps = _digests(stage.get("deps"))
    reads = {path: md5 for path, md5 in deps.items() if not path.startswith(CODE)}
    code = {path: md5 for path, md5 in deps.items() if path.startswith(CODE)}
    params = {key: value for block in stage.get("params", {}).values() for key, value in block.items()}
    raw = tuple(path for path in reads if path not in made_by)
    return StageProvenance(name, reads, _digests(stage.get("outs")), code, params, raw)


def _digests(entries: Any) -> dict[str, str]:
    return {str(entry["path"]): str(entry.get("md5", "")) for entry in entries or () if isinstance(entry, dict)}


class DvcCache:
    """Read access to DVC's local cache by md5. A folder is stored as a JSON listing of its files."""

    def __init__(self, layout: ProjectPaths) -> None:
        self._root = layout.root

    @cached_property
    def folder(self) -> Path:
        """Folder of the cache, as `dvc cache dir` prints it."""
        return (self._root / _dvc(self._root, "cache", "dir").strip().splitlines()[-1]).resolve()

    def path(self, md5: str) -> Path | None:
        """Path of an object; None if it is not in the cache."""
        found = self.folder / "files/md5" / md5[:2] / md5[2:]
        return found if found.is_file() else None

    def listing(self, md5: str) -> dict[str, str] | None:
        """Relative path -> md5 of a folder; None if it is not in the cache."""
        found = self.path(md5)
        if found is None:
            return None
        return {str(row["relpath"]): str(row["md5"]) for row in json.loads(found.read_text(encoding="utf-8"))}

    def member(self, folder_md5: str, name: str) -> Path | None:
        """Path of a file of a folder; None if it is not in the cache."""
        md5 = (self.listing(folder_md5) or {}).get(name)
        return self.path(md5) if md5 else None


def checkout_snapshot(layout: ProjectPaths, lock: LockSnapshot, target: Path) -> dict[str, str]:
    """Check out a commit with its data below `target` and verify every out against the lock.

    Code and raw data come from git, outs from DVC's cache or its remote.

    Returns:
        Path -> md5 of every out and of the raw data; raw data outside the repository are not included.

    Raises:
        ConfigError: `target` is not empty.
        DataError: the project is not a git repository, or objects are missing.
        IntegrityError: a file has another md5 than the lock.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty", "name a new folder")
    cache = DvcCache(layout)
    commit = lock.commit or try_git(layout.root, "rev-parse", "HEAD") or ""
    if not commit:
        raise DataError("the project is not a git repository, so there is no history", "run: git init, and commit")
    top = try_git(layout.root, "rev-parse", "--show-toplevel") or ""
    inside = try_git(layout.root, "rev-parse", "--show-prefix") or ""
    where = str(target.resolve())
    if try_git(layout.root, "clone", "--quiet", "--no-checkout", top, where) is None:
        raise DataError(f"git clone into {target} failed", "check free space and permissions of the folder")
    copy = ProjectPaths(target / inside)
    if try_git(target, "checkout", "--quiet", "--detach", commit) is None:
        raise DataError(f"git checkout of {commit[:12]} failed", "run: git fetch --all")
    if not lock.commit:
        for name in (LOCK, "dvc.yaml", "params.yaml"):
            (copy.root / name).write_bytes((layout.root / name).read_bytes())
    _dvc(copy.root, "cache", "dir", "--local", str(cache.folder))
    wanted = lock_outs(lock.content)
    try:
        _dvc(copy.root, "checkout", "--quiet")
    except DataError:
        _dvc(copy.root, "pull", "--quiet")
    if not lock.commit:
        _copy_uncommitted(layout, copy, wanted, cache)
    found = {path: hash_path(copy.root / path) for path in wanted if (copy.root / path).exists()}
    if missing := sorted(wanted.keys() - found.keys()):
        raise DataError(
            f"{missing[0]} is neither in DVC's cache nor in its remote", "dvc push where it was made, or run the stage again"
        )
    for path, md5 in raw_data(lock.content).items():
        if (copy.root / path).exists():
            wanted[path], found[path] = md5, hash_path(copy.root / path)
    if wrong := sorted(path for path in wanted if found[path] != wanted[path]):
        raise IntegrityError(f"{target / inside / wrong[0]} has md5 {found[wrong[0]]}, not {wanted[wrong[0]]} as in dvc.lock")
    return found


def _copy_uncommitted(layout: ProjectPaths, copy: ProjectPaths, wanted: Mapping[str, str], cache: DvcCache) -> None:
    """Copy files of an uncommitted lock that git tracks instead of DVC (`cache: false`), such as reports.

    Most of them are in DVC's run cache; the others are copied from the work tree.
    """
    for path, md5 in wanted.items():
        source, file = cache.path(md5) or layout.root / path, copy.root / path
        valid = source.is_file() and not md5.endswith(".dir") and hash_path(source) == md5
        if valid and not (file.is_file() and hash_path(file) == md5):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)  # it may be a link into the cache
            shutil.copyfile(source, file)


def _dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise DataError(f"dvc {' '.join(arguments)}: {lines[-1] if lines else done.returncode}", "run: dvc doctor")
    return done.stdout
