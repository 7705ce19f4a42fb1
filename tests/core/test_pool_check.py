"""The pool check agrees with DVC itself: what it accepts DVC hashes, and what it names stops DVC."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.pool_check import check_pool, find_unhashable

DVC_SECONDS = 45.0
"""Time limit within which DVC hashes a few files on a loaded machine."""


def text(folder: Path, name: str, content: str = "x") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def unix_socket(folder: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # the address of a socket is limited to some hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("x.png")
    finally:
        os.chdir(here)


def hidden_pipe(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    os.mkfifo(folder / ".hidden/pipe")


def latin_name(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")).write_text("x")


def linked_pipe(folder: Path) -> None:
    os.mkfifo(folder.parent / "pipe")
    (folder / "x.png").symlink_to("../pipe")


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "dangling link": (lambda folder: (folder / "x.png").symlink_to("nowhere"), "x.png", "missing file"),
    "link to itself": (lambda folder: (folder / "x.png").symlink_to("x.png"), "x.png", "circle of links"),
    "named pipe": (lambda folder: os.mkfifo(folder / "x.png"), "x.png", "a named pipe"),
    "hidden named pipe": (hidden_pipe, ".hidden/pipe", "a named pipe"),
    "link to a named pipe": (linked_pipe, "x.png", "a named pipe"),
    "socket": (unix_socket, "x.png", "a socket"),
    "name in Latin-1": (latin_name, "caf\\xe9.png", "UTF-8"),
    ".dvcignore": (lambda folder: text(folder, ".dvcignore", "*.x\n"), ".dvcignore", "no .dvcignore"),
    "nested .dvcignore": (lambda folder: text(folder, "a/b/.dvcignore", "*.x\n"), "a/b/.dvcignore", "no .dvcignore"),
}  # fmt: skip
GOOD: dict[str, Callable[[Path], object]] = {
    "files": lambda folder: text(folder, "a/b.txt"),
    "link to a folder above": lambda folder: (folder / "up").symlink_to(".."),
    "link to a file outside": lambda folder: (folder / "x").symlink_to("/etc/hostname"),
    "repository": lambda folder: (text(folder, ".git/config"), text(folder, ".dvc/config")),
    "strange names": lambda folder: (text(folder, "a\nb"), text(folder, "a\\b"), text(folder, "l" * 250)),
}


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    folder = tmp_path / "pool"
    text(folder, "plain.txt")
    return folder


def dvc_hashes(pool: Path) -> bool:
    """Whether DVC runs a stage that depends on the folder, within a time limit."""
    root = pool.parent
    (root / "dvc.yaml").write_text("stages:\n  s:\n    cmd: 'true'\n    deps: [pool]\n")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=root, check=True)
    try:
        done = subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=root, timeout=DVC_SECONDS, capture_output=True)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


@pytest.mark.parametrize("name", BAD)
def test_bad_entries_are_named(pool: Path, name: str) -> None:
    make, path, problem = BAD[name]
    make(pool)
    (entry,) = find_unhashable(pool)
    assert entry.path == path
    assert problem in entry.problem
    with pytest.raises(DataError, match="DVC cannot hash the pool"):
        check_pool(pool)


@pytest.mark.parametrize("name", GOOD)
def test_good_entries_pass(pool: Path, name: str) -> None:
    GOOD[name](pool)
    assert list(find_unhashable(pool)) == []


@pytest.mark.parametrize("name", ["dangling link", "named pipe", "nested .dvcignore", "name in Latin-1"])
def test_dvc_cannot_hash_what_the_check_names(pool: Path, name: str) -> None:
    BAD[name][0](pool)
    assert not dvc_hashes(pool)


def test_dvc_hashes_what_the_check_accepts(pool: Path) -> None:
    for make in GOOD.values():
        make(pool)
    assert dvc_hashes(pool)


def test_missing_folder_is_left_to_the_stage(tmp_path: Path) -> None:
    check_pool(tmp_path / "nowhere")
