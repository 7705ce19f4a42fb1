"""DVC's md5 of stage inputs and models, computed or read from `dvc.lock`. Does not import dvc.

DVC writes the outs of a finished stage to `dvc.lock`. A later stage under `dvc repro` reads the digests of its inputs there. A
stage run by hand may find an outdated lock; then the input is hashed as DVC does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.git import try_git
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.project_paths import ProjectPaths

GIT_TIMEOUT_S = 5


def md5_file(path: Path) -> str:
    """md5 of a file's bytes, as DVC 3 records it."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def directory_listing(folder: Path) -> list[dict[str, str]]:
    """DVC's listing of a folder: `md5` and `relpath` of every file, sorted by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    rows = [{"md5": md5_file(path), "relpath": path.relative_to(folder).as_posix()} for path in files]
    return sorted(rows, key=lambda row: row["relpath"])


def listing_digest(rows: list[dict[str, str]]) -> str:
    """DVC's id of a folder: md5 of the JSON listing, with the suffix `.dir` (36 characters, MLflow's limit for a digest)."""
    payload = json.dumps(rows, sort_keys=True).encode("utf-8")
    return hashlib.md5(payload, usedforsecurity=False).hexdigest() + ".dir"


def hash_path(path: Path) -> str:
    """DVC's md5 of a file or folder on disk.

    Raises:
        FileNotFoundError: `path` does not exist.
    """
    return listing_digest(directory_listing(path)) if path.is_dir() else md5_file(path)


def read_lock(path: Path) -> dict[str, Any]:
    """Read `dvc.lock`; an empty mapping if the file does not exist.

    Raises:
        ConfigError: the file is not a valid lock file (for example after a crash or a full disk).
    """
    return parse_lock(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.is_file() else {}


def parse_lock(text: str, where: str) -> dict[str, Any]:
    """Parse the text of a `dvc.lock`. `where` is its name in errors.

    Raises:
        ConfigError: see `read_lock`.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    action = "git checkout dvc.lock, then dvc repro (DVC restores finished stages from its cache)"
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}", action) from error
    if not isinstance(value, dict) or not isinstance(value.get("stages"), dict) or "schema" not in value:
        raise ConfigError(f"{where} is not a lock file: it does not contain schema and stages", action)
    return value


def lock_outs(lock: Mapping[str, Any]) -> dict[str, str]:
    """Out path -> DVC md5 for all stages of a lock."""
    return {
        str(out["path"]): str(out["md5"])
        for stage in lock.get("stages", {}).values()
        for out in stage.get("outs", [])
        if isinstance(out, dict) and "md5" in out
    }


def relative(layout: ProjectPaths, path: Path) -> str:
    """`path` relative to the project root, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), layout.root.resolve())).as_posix()


def dvc_digest(layout: ProjectPaths, path: Path) -> tuple[str, str]:
    """DVC md5 of a stage's input and its source: `dvc.lock` (under `dvc repro`) or `hashed` (stage run by hand)."""
    if "DVC_STAGE" in os.environ:  # set by DVC for the command that it runs; the lock is current for all earlier stages
        locked = lock_outs(read_lock(layout.lock)).get(relative(layout, path))
        if locked:
            return locked, "dvc.lock"
    return hash_path(path), "hashed"


def inputs_digest(digests: Mapping[str, str], params: Mapping[str, Any]) -> str:
    """Hash of input digests and parameters; equal for a run and for its restoration from DVC's cache."""
    return fingerprint({"deps": dict(digests), "params": dict(params)})


def model_tags(layout: ProjectPaths, folder: Path) -> dict[str, str]:
    """Tags of a model version: counts of the pair set, and families of the networks in captions, embeddings and model.

    Files that do not exist (a stage run alone, on another machine) are left out.
    """
    statistics = _read_json(layout.pairs / "stats.json")
    assignment, splits, leaks = (_mapping(statistics.get(name)) for name in ("assignment", "splits", "leaks"))
    counts = {"pairs": statistics.get("pairs")}
    counts |= {name: assignment.get(name) for name in ("max_reuse", "coverage", "gini")}
    counts |= {split: splits.get(split) for split in ("train", "val", "test")}
    counts["leaks"] = sum(leaks.values()) if isinstance(statistics.get("leaks"), dict) else None
    families = {
        "captions": _families(layout.captions / "meta.json"),
        "embeddings": _families(layout.embeddings / "meta.json"),
        "model": sorted(path.stem for path in (folder / "encoder").glob("*.safetensors")),
    }
    tags = {f"pairs.{name}": str(value) for name, value in counts.items() if value is not None}
    return tags | {f"families.{name}": ", ".join(found) for name, found in families.items() if found}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _families(path: Path) -> list[str]:
    """Model families in a stage's `meta.json`."""
    names = _read_json(path).get("families", [])
    return sorted(str(name) for name in names) if isinstance(names, list) else []


def git_tags(layout: ProjectPaths) -> dict[str, str]:
    """Tags with the commit and whether the work tree has changes; empty outside a repository or without git."""
    commit = try_git(layout.root, "rev-parse", "HEAD", timeout_s=GIT_TIMEOUT_S)
    if not commit:
        return {}
    changed = try_git(layout.root, "status", "--porcelain", "--untracked-files=no", timeout_s=GIT_TIMEOUT_S)
    return {"git.commit": commit, "mlflow.source.git.commit": commit, "git.dirty": str(bool(changed)).lower()}
