"""Which bytes went in: DVC's md5 of a stage's inputs, as data-set digests and as one `dvc.inputs` hash. No dvc import.

DVC writes the outs of a finished stage to `dvc.lock`, so a later stage finds the digests of its inputs there while it runs
under `dvc repro`. A stage run by hand may find an old lock; then the folder is hashed the way DVC does it.
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
    """DVC's description of a folder: `md5` and `relpath` of every file, sorted by path."""
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
        FileNotFoundError: there is nothing at `path`.
    """
    return listing_digest(directory_listing(path)) if path.is_dir() else md5_file(path)


def read_lock(path: Path) -> dict[str, Any]:
    """`dvc.lock` as a mapping; empty when the file is not there.

    Raises:
        ConfigError: it is not YAML or not a lock file (a crash or a full disk while DVC wrote it).
    """
    return parse_lock(path.read_text(encoding="utf-8", errors="replace"), str(path)) if path.is_file() else {}


def parse_lock(text: str, where: str) -> dict[str, Any]:
    """The text of a `dvc.lock` as a mapping. `where` names it in errors.

    Raises:
        ConfigError: see `read_lock`.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    cure = "git checkout dvc.lock, then dvc repro (finished stages come back from DVC's cache)"
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{where} is broken: {' '.join(str(error).split())}", cure) from error
    if not isinstance(value, dict) or not isinstance(value.get("stages"), dict) or "schema" not in value:
        raise ConfigError(f"{where} is broken: it does not hold a schema and stages", cure)
    return value


def lock_outs(lock: Mapping[str, Any]) -> dict[str, str]:
    """Out path -> DVC md5, over all stages of a lock."""
    return {
        str(out["path"]): str(out["md5"])
        for stage in lock.get("stages", {}).values()
        for out in stage.get("outs", [])
        if isinstance(out, dict) and "md5" in out
    }


def relative(layout: ProjectPaths, path: Path) -> str:
    """`path` below the project root, with forward slashes."""
    return Path(os.path.relpath(path.resolve(), layout.root.resolve())).as_posix()


def dvc_digest(layout: ProjectPaths, path: Path) -> tuple[str, str]:
    """DVC md5 of a stage's input and where it comes from: `dvc.lock` (inside `dvc repro`) or `hashed` (by hand)."""
    if "DVC_STAGE" in os.environ:  # set by DVC for the command it runs: the lock is current for every earlier stage
        known = lock_outs(read_lock(layout.root / "dvc.lock")).get(relative(layout, path))
        if known:
            return known, "dvc.lock"
    return hash_path(path), "hashed"


def inputs_digest(digests: Mapping[str, str], params: Mapping[str, Any]) -> str:
    """One hash over the inputs' digests and the parameters: equal for a run and for its restoration from DVC's cache."""
    return fingerprint({"deps": dict(digests), "params": dict(params)})


def model_tags(layout: ProjectPaths, folder: Path) -> dict[str, str]:
    """What a model was made of, for its version's tags: counts of the pair set, and families of the networks that took part.

    Files that are not there (a stage run alone, on another machine) are left out.
    """
    tags: dict[str, str] = {}
    statistics = _read_json(layout.pairs / "stats.json")
    wanted = {"pairs": statistics.get("pairs"), "max_reuse": _inner(statistics, "assignment", "max_reuse")}
    wanted |= {name: _inner(statistics, "assignment", name) for name in ("coverage", "gini")}
    wanted |= {split: _inner(statistics, "splits", split) for split in ("train", "val", "test")}
    leaks = statistics.get("leaks")
    wanted["leaks"] = sum(leaks.values()) if isinstance(leaks, dict) else None
    tags |= {f"pairs.{name}": str(value) for name, value in wanted.items() if value is not None}
    for name, found in (
        ("captions", _families(layout.captions / "meta.json")),
        ("embeddings", _families(layout.embeddings / "meta.json")),
        ("model", sorted(path.stem for path in (folder / "encoder").glob("*.safetensors"))),
    ):
        if found:
            tags[f"families.{name}"] = ", ".join(found)
    return tags


def _inner(value: Mapping[str, Any], outer: str, name: str) -> Any:
    block = value.get(outer)
    return block.get(name) if isinstance(block, dict) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _families(path: Path) -> list[str]:
    """Families of networks that a stage's `meta.json` names."""
    named = _read_json(path).get("families", [])
    return sorted(str(name) for name in named) if isinstance(named, list) else []


def git_tags(layout: ProjectPaths) -> dict[str, str]:
    """Commit and cleanliness of the work tree; empty outside a repository or without git."""
    commit = try_git(layout.root, "rev-parse", "HEAD", timeout_s=GIT_TIMEOUT_S)
    if not commit:
        return {}
    changed = try_git(layout.root, "status", "--porcelain", "--untracked-files=no", timeout_s=GIT_TIMEOUT_S)
    return {"git.commit": commit, "mlflow.source.git.commit": commit, "git.dirty": str(bool(changed)).lower()}
