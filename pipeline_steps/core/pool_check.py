"""Entries of a raw pool at which DVC fails or waits without end.

DVC hashes the whole folder of a source before and after the stage, hidden files included, and opens everything that is no
folder. Ingest quarantines such entries; DVC stops with exit code 255, or waits for a writer of a named pipe. So commands that
start DVC check the pool first. Nothing is opened here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline_steps.core.config import load_params
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.safe_paths import display_path, kind_of_file

MAX_ENTRIES = 20
DVC_IGNORED = frozenset({".git", ".hg", ".dvc"})
"""Folders that DVC never reads."""


class UnhashableEntry(NamedTuple):
    """Path below the pool, as printable text, and why DVC cannot hash it."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def find_unhashable(root: Path) -> Iterator[UnhashableEntry]:
    """Entries below `root` that DVC cannot hash, in the order of their names."""
    waiting = [Path()]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(root / folder) as scan:
                entries = sorted(scan, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            yield UnhashableEntry(display_path(str(folder)), f"the folder cannot be listed ({error.strerror})")
            continue
        inner = []
        for entry in entries:
            path = folder / entry.name
            if problem := _problem(entry):
                yield UnhashableEntry(display_path(str(path)), problem)
            elif entry.is_dir(follow_symlinks=False) and entry.name not in DVC_IGNORED:
                inner.append(path)
        waiting.extend(reversed(inner))


def _problem(entry: os.DirEntry[str]) -> str:
    """Reason why DVC cannot hash an entry; empty if it can, or does not follow it."""
    try:
        entry.name.encode("utf-8")
    except UnicodeEncodeError:
        return "the name is not UTF-8"
    if entry.name == ".dvcignore":
        return "DVC allows no .dvcignore below a dependency"
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        circle = error.errno == errno.ELOOP
        return "a circle of links" if circle else f"a link to a missing file ({error.strerror})"
    if stat.S_ISDIR(mode):
        return ""
    if not stat.S_ISREG(mode):
        return f"{kind_of_file(mode)}, not a plain file"
    return "" if os.access(entry.path, os.R_OK) else "not readable"


def check_pool(root: Path, key: str = "ingest.root") -> None:
    """Raise DataError when DVC cannot hash a folder; a missing folder is left to the stage.

    Args:
        root: the folder.
        key: key of `params.yaml` that names it.
    """
    found = list(find_unhashable(root)) if root.is_dir() else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise DataError(
            f"{key}: DVC cannot hash the pool {root}: {found[0]}{more}",
            "remove, rename or replace the entries; list them with: sonify check " + str(root),
            details={"examples": [str(entry) for entry in found[:MAX_ENTRIES]]},
        )


def pool_roots(params: Mapping[str, Any]) -> dict[str, str]:
    """Name -> folder of each source of the parameters, before they are validated; the name of a single root is empty."""
    section = params.get("ingest")
    section = section if isinstance(section, Mapping) else {}
    pools = section.get("pools") or {"": section}
    return {
        str(name): pool["root"]
        for name, pool in (pools.items() if isinstance(pools, Mapping) else ())
        if isinstance(pool, Mapping) and isinstance(pool.get("root"), str)
    }


def source_deps(params: Mapping[str, Any]) -> dict[str, str]:
    """Path -> key of each folder and table that stage ingest reads."""
    section = params.get("ingest") or {}
    deps: dict[str, str] = {}
    for name, root in pool_roots(params).items():
        key, pool = (f"ingest.pools.{name}", section["pools"][name]) if name else ("ingest", section)
        deps.setdefault(root, f"{key}.root")
        metadata = pool.get("metadata")
        table = Path(metadata) if isinstance(metadata, str) else Path()
        if table.is_absolute() and not table.is_relative_to(Path(root).absolute()):
            deps.setdefault(str(table), f"{key}.metadata")
    return deps


def check_project_pools(layout: ProjectPaths) -> None:
    """Raise DataError when DVC cannot hash a source of `params.yaml`, ConfigError when it does not depend on one."""
    params = load_params(layout.params) if layout.params.is_file() else {}
    for name, root in pool_roots(params).items():
        check_pool(layout.root / root, f"ingest.pools.{name}.root" if name else "ingest.root")
    check_pool_deps(layout)


def check_pool_deps(layout: ProjectPaths) -> None:
    """Raise ConfigError when a source is no dependency of stage ingest in `dvc.yaml`: its changes would go unnoticed."""
    from ruamel.yaml import YAML

    if not (layout.params.is_file() and layout.graph.is_file()):
        return
    wanted = source_deps(load_params(layout.params))
    graph = YAML(typ="safe", pure=True).load(layout.graph.read_text(encoding="utf-8")) or {}
    listed = [str(dep) for dep in graph.get("stages", {}).get("ingest", {}).get("deps", ())]
    values = {f"${{{key}}}": path for path, key in wanted.items()}
    deps = [Path(os.path.normpath(layout.root / values.get(dep, dep))) for dep in listed]
    for path, key in wanted.items():
        if listed and not any(Path(os.path.normpath(layout.root / path)).is_relative_to(dep) for dep in deps):
            raise ConfigError(
                f"{key}: {path} is no dependency of stage ingest in dvc.yaml, so DVC would not see its changes",
                "add it there; in a project made by sonify init, run: sonify init .",
            )
