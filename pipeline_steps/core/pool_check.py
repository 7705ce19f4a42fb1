"""Entries of a raw pool at which DVC fails or waits without end.

DVC hashes the whole folder `ingest.root` before and after the stage, hidden files included, and opens everything that is no
folder. Ingest quarantines such entries; DVC stops with exit code 255, or waits for a writer of a named pipe. So commands that
start DVC check the pool first. Nothing is opened here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline_steps.core.config import load_params
from pipeline_steps.core.errors import DataError
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


def check_pool(root: Path) -> None:
    """Raise DataError when DVC cannot hash a folder; a missing folder is left to the stage."""
    found = list(find_unhashable(root)) if root.is_dir() else []
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise DataError(
            f"DVC cannot hash the pool {root}: {found[0]}{more}",
            "remove, rename or replace the entries; list them with: sonify check " + str(root),
            details={"examples": [str(entry) for entry in found[:MAX_ENTRIES]]},
        )


def check_ingest_root(layout: ProjectPaths) -> None:
    """Raise DataError when DVC cannot hash `ingest.root` of `params.yaml`."""
    section = load_params(layout.params).get("ingest") if layout.params.is_file() else None
    if isinstance(section, dict) and isinstance(section.get("root"), str):
        check_pool(layout.root / section["root"])
