"""Checksums of a stage's outs: recorded by the stage, compared by each reader.

A stage writes `checksums.sha256` last into each of its folders, with one line per file in the format of `sha256sum`; the last
line is a comment with the sha256 of the lines before. Media shards are left out: each of their items has its hash in
`index.parquet`, so an item is checked without reading its shard. A folder without the record (a checkpoint of somebody else, an
interrupted stage) has nothing to compare with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline_steps.core.atomic import write_text
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.hashing import sha256_bytes, sha256_file

NAME = "checksums.sha256"
LEVELS = 3
"""Folders above a file in which its record is searched; exported models have folders in folders."""

_HEAD = re.compile(r"# written by stage ([a-z]+)\n")
_LINE = re.compile(r"^([0-9a-f]{64})  (.+)$", re.MULTILINE)


@contextmanager
def record_checksums(stage: str, *folders: Path) -> Iterator[None]:
    """Remove the records of `folders`, and write them anew when the block ends without an error."""
    for folder in folders:
        (folder / NAME).unlink(missing_ok=True)
    yield
    for folder in folders:
        write_checksums(stage, folder)


def write_checksums(stage: str, folder: Path) -> None:
    """Record the files of a folder that `stage` has written."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_file(folder / name)}  {name}\n" for name in names if name != NAME and not name.endswith(".tar")]
    text = f"# written by stage {stage}\n" + "".join(lines)
    write_text(folder / NAME, f"{text}# {sha256_bytes(text.encode())}\n")


def read_checksums(folder: Path) -> tuple[str, dict[str, str]]:
    """Stage and sha256 by relative path of a recorded folder.

    Raises:
        IntegrityError: the record is damaged.
    """
    text, _, last = (folder / NAME).read_bytes().decode("utf-8", "replace").rpartition("# ")
    head = _HEAD.match(text)
    if head is None or last != f"{sha256_bytes(text.encode())}\n":
        raise IntegrityError(f"{folder / NAME} is damaged", _repair(folder / NAME, folder, head.group(1) if head else ""))
    return head.group(1), {name: digest for digest, name in _LINE.findall(text)}


def verified_sha256(path: Path) -> str:
    """sha256 of a file, after `check_digest`."""
    digest = sha256_file(path)
    check_digest(path, digest)
    return digest


def read_verified(path: Path) -> bytes:
    """Content of a file, after `check_digest`."""
    payload = path.read_bytes()
    check_digest(path, sha256_bytes(payload))
    return payload


def check_digest(path: Path, sha256: str) -> None:
    """Compare the sha256 of a file with the recorded one.

    Raises:
        IntegrityError: they differ, or the record is damaged.
    """
    folder = _recorded_folder(path)
    if folder is not None:
        recorded = read_checksums(folder)[1].get(path.relative_to(folder).as_posix(), "no such file")
        if recorded != sha256:
            raise damaged(path, f"sha256 is {sha256}, {folder / NAME} has {recorded}")


def damaged(path: Path, problem: str) -> IntegrityError:
    """Error about a file of an out, with the commands that restore it."""
    folder = _recorded_folder(path)
    if folder is None:
        return IntegrityError(f"{path}: {problem}", f"restore it: {_repair(path, path.parent, '')}")
    return IntegrityError(f"{path}: {problem}", _repair(path, folder, read_checksums(folder)[0]))


def _recorded_folder(path: Path) -> Path | None:
    """Nearest folder above a file that has a record."""
    return next((folder for folder in path.parents[:LEVELS] if (folder / NAME).is_file()), None)


def _repair(path: Path, folder: Path, stage: str) -> str:
    return f"rm {path} && dvc checkout {folder}; or dvc repro --force {stage or 'the stage that writes it'}"
