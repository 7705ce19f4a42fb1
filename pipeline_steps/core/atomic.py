"""Atomic writes: temporary file beside the target, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_NAME_BYTES = 255
"""Limit of the usual file systems for one name."""


def shortened(name: str, max_bytes: int) -> str:
    """Beginning of a file name that has at most `max_bytes` bytes in UTF-8."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= max_bytes else encoded[:max_bytes].decode("utf-8", "ignore")


def fsync_dir(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it replaces `target`, on error it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{shortened(target.name, MAX_NAME_BYTES - 24)}."  # mkstemp adds eight characters
    descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
        fsync_dir(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, payload: bytes) -> None:
    """Write `payload` to `target` atomically."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(payload)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 `text` to `target` atomically."""
    write_bytes(target, text.encode("utf-8"))


def write_json(target: Path, value: Any) -> None:
    """Write `value` as sorted, indented JSON. NaN and infinity raise ValueError: they are not JSON."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def link_or_copy(source: str | Path, target: str | Path) -> str:
    """Hard link `target` to `source` (symbolic links resolved), or a copy where the file system has no such link.

    Usable as `copy_function` of `shutil.copytree`. Returns the target.
    """
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
    return str(target)
