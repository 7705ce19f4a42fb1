"""Back from a model to its inputs: `dvc.lock` as it was when the model was made, found by the model's md5 in git's history.

A stage runs before its results are committed, so the commit an MLflow run names is the one *before* the lock with its
outs. The lock is found by content instead: the work tree's, or that of the first commit whose lock holds the md5.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.git import try_git
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.lineage.dvc_digests import hash_path, inputs_digest, lock_outs, parse_lock

LOCK = "dvc.lock"
CODE = "pipeline_steps/"
"""History takes longer to read than the two questions that every tracked run asks."""
MAX_COMMITS = 5000


@dataclass(frozen=True, slots=True)
class LockSnapshot:
    """A `dvc.lock`. `commit` is empty for the work tree's."""

    commit: str
    content: Mapping[str, Any]

    @property
    def where(self) -> str:
        """For people."""
        return f"commit {self.commit[:12]}" if self.commit else "the work tree (not committed)"


@dataclass(frozen=True, slots=True)
class StageProvenance:
    """One stage on the way: its command's inputs and outs with DVC md5, its code, and a digest of its parameters."""

    stage: str
    reads: Mapping[str, str]
    writes: Mapping[str, str]
    code: Mapping[str, str]
    params: Mapping[str, Any]
    raw: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "stage": self.stage,
            "reads": dict(self.reads),
            "raw": list(self.raw),
            "writes": dict(self.writes),
            "code": dict(self.code),
            "params_digest": inputs_digest({}, self.params),
        }


def iter_lock_history(layout: ProjectPaths, holding: str = "") -> Iterator[LockSnapshot]:
    """Every lock of the project: commits of all branches, oldest first, then the work tree's. Broken ones are passed over.

    With `holding`, only those whose text has it: reading YAML takes longer than looking for an md5.
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
    """The first lock in which the out `path` has this md5.

    Args:
        layout: the project.
        path: out, relative to the project.
        md5: its DVC md5.
        commit: look there first.

    Raises:
        DataError: no lock has it (it was made outside `dvc repro`, or its commit is not in this clone).
    """
    found = [lock for lock in iter_lock_history(layout, md5) if lock_outs(lock.content).get(path) == md5]
    if not found:
        raise DataError(
            f"no dvc.lock in this repository holds {path} with md5 {md5}",
            f"git fetch --all{f'; it was made at or after commit {commit[:12]}' if commit else ''}",
        )
    return next((lock for lock in found if lock.commit and lock.commit == commit), found[0])


def stage_lineage(lock: Mapping[str, Any], target: str) -> list[StageProvenance]:
    """Every stage that `target` (an out) comes from, in order, and those that read it. Pure.

    Raises:
        DataError: no stage writes `target`.
    """
    stages: Mapping[str, Any] = lock["stages"]
    made_by = {path: name for name, stage in stages.items() for path in _digests(stage.get("outs"))}
    if target not in made_by:
        raise DataError(f"dvc.lock has no out {target}", "dvc repro")
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
    judges = [name for name, stage in stages.items() if target in _digests(stage.get("deps"))]
    for name in sorted(judges):
        visit(name)
    return [_step(name, stages[name], made_by) for name in order]


def raw_data(lock: Mapping[str, Any]) -> dict[str, str]:
    """Path -> DVC md5 of what stages read and no stage writes, code left out. Pure."""
    outs = lock_outs(lock)
    deps = {path: md5 for stage in lock["stages"].values() for path, md5 in _digests(stage.get("deps")).items()}
    return {path: md5 for path, md5 in deps.items() if path not in outs and not path.startswith(CODE)}


def _step(name: str, stage: Mapping[str, Any], made_by: Mapping[str, str]) -> StageProvenance:
    deps = _digests(stage.get("deps"))
    reads = {path: md5 for path, md5 in deps.items() if not path.startswith(CODE)}
    code = {path: md5 for path, md5 in deps.items() if path.startswith(CODE)}
    params = {key: value for block in stage.get("params", {}).values() for key, value in block.items()}
    raw = tuple(path for path in reads if path not in made_by)
    return StageProvenance(name, reads, _digests(stage.get("outs")), code, params, raw)


def _digests(entries: Any) -> dict[str, str]:
    return {str(entry["path"]): str(entry.get("md5", "")) for entry in entries or () if isinstance(entry, dict)}


class DvcCache:
    """DVC's local cache, read by md5. It holds whole outs: a folder is a JSON listing of its files."""

    def __init__(self, layout: ProjectPaths) -> None:
        self._layout = layout
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Where it is, as the `dvc` command says."""
        if self._folder is None:
            told = _dvc(self._layout.root, "cache", "dir")
            self._folder = (self._layout.root / told.strip().splitlines()[-1]).resolve()
        return self._folder

    def path(self, md5: str) -> Path | None:
        """Path of an object; None when it is not in the cache."""
        found = self.folder / "files/md5" / md5[:2] / md5[2:]
        return found if found.is_file() else None

    def listing(self, md5: str) -> dict[str, str] | None:
        """Relative path -> md5 of a folder; None when it is not in the cache."""
        found = self.path(md5)
        if found is None:
            return None
        return {str(row["relpath"]): str(row["md5"]) for row in json.loads(found.read_text(encoding="utf-8"))}

    def member(self, folder_md5: str, name: str) -> Path | None:
        """A file of a folder that is in the cache."""
        listing = self.listing(folder_md5)
        md5 = (listing or {}).get(name)
        return self.path(md5) if md5 else None


def checkout_snapshot(layout: ProjectPaths, lock: LockSnapshot, target: Path) -> dict[str, str]:
    """Materialise a commit with its data below `target` and check every out on disk against the lock.

    Code and raw data come from git, outs from DVC's cache (or its remote). Returns path -> md5 found, of every out and of
    the raw data; raw data that lie elsewhere (a pool on another disk) are not in it.

    Raises:
        ConfigError: `target` is there already.
        DataError: the lock is not committed and this is no git repository, or objects are missing.
        IntegrityError: what came out has other bytes.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty", "name a new folder")
    cache = DvcCache(layout)
    commit = lock.commit or try_git(layout.root, "rev-parse", "HEAD") or ""
    if not commit:
        raise DataError("this project is no git repository: there is no history to check out", "git init and commit")
    top = try_git(layout.root, "rev-parse", "--show-toplevel") or ""
    inside = try_git(layout.root, "rev-parse", "--show-prefix") or ""
    where = str(target.resolve())
    if try_git(layout.root, "clone", "--quiet", "--no-checkout", top, where) is None:
        raise DataError(f"git clone into {target} failed", "is there room, and is the folder writable?")
    copy = ProjectPaths(target / inside)
    if try_git(target, "checkout", "--quiet", "--detach", commit) is None:
        raise DataError(f"git checkout of {commit[:12]} failed", "git fetch --all")
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
        raise DataError(f"{missing[0]} is neither in DVC's cache nor in its remote", "dvc pull where it was made, or rebuild")
    for path, md5 in raw_data(lock.content).items():
        if (copy.root / path).exists():
            wanted[path], found[path] = md5, hash_path(copy.root / path)
    if wrong := sorted(path for path in wanted if found[path] != wanted[path]):
        raise IntegrityError(f"{target / inside / wrong[0]} has md5 {found[wrong[0]]}, dvc.lock says {wanted[wrong[0]]}")
    return found


def _copy_uncommitted(layout: ProjectPaths, copy: ProjectPaths, wanted: Mapping[str, str], cache: DvcCache) -> None:
    """Bring files of a lock that is not committed into the copy: reports that git keeps instead of DVC (`cache: false`).

    The cache holds most of them (DVC's memory of runs); one that it does not hold is taken from the work tree.
    """
    for path, md5 in wanted.items():
        here, there = layout.root / path, copy.root / path
        source = cache.path(md5) or here
        right = source.is_file() and not md5.endswith(".dir") and hash_path(source) == md5
        if right and not (there.is_file() and hash_path(there) == md5):
            there.parent.mkdir(parents=True, exist_ok=True)
            there.unlink(missing_ok=True)  # it may be a link into the cache
            shutil.copyfile(source, there)


def _dvc(root: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DataError(f"dvc {' '.join(arguments)}: {said[-1] if said else done.returncode}", "see dvc doctor")
    return done.stdout
