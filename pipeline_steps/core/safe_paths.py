"""Untrusted folders: walk them, validate names, and open regular files below the root.

No function parses content or passes a name to a shell. A link is resolved before the file is opened. Every open walks the
path folder by folder with `O_NOFOLLOW`, so that a name that was replaced by a link in between is rejected.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

BLOCK = 1 << 20
"""Bytes read at a time."""

_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff]")
_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass
class UnsafePathError(Exception):
    """A path that must not be opened, or is not a regular file.

    `code` is one of FILE_MISSING, FILE_UNREADABLE, NOT_A_FILE, PATH_ENCODING, PATH_UNSAFE.
    """

    code: str
    reason: str

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


def display_path(name: str) -> str:
    """`name` as text that is safe in a table, a terminal and a page: backslash escapes for control characters,
    direction overrides and bytes that are not UTF-8. Different names stay different.
    """
    text = name.replace("\\", "\\\\")
    text = "".join(f"\\x{ord(char) - 0xDC00:02x}" if 0xDC80 <= ord(char) <= 0xDCFF else char for char in text)
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def check_encoding(name: str) -> None:
    """Raise PATH_ENCODING when `name` holds bytes that are not UTF-8 (python shows them as lone surrogates)."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnsafePathError("PATH_ENCODING", f"the file name is not UTF-8: {display_path(name)}; rename the file") from error


def validate_relative_path(text: str) -> str:
    """A path from an untrusted table as a normalised relative path, without touching the disk.

    Raises:
        UnsafePathError: PATH_UNSAFE for an empty, absolute, home, drive, URL, backslash or parent-climbing path or one with
            a NUL byte; PATH_ENCODING when it is not UTF-8.
    """
    check_encoding(text)
    for unsafe, reason in (
        (not text.strip(), "the path is empty"),
        ("\x00" in text, "the path holds a NUL byte"),
        ("\\" in text, "the path holds a backslash; use / between folders"),
        (text.startswith("/") or _DRIVE.match(text), "the path is absolute; paths are relative to the root"),
        (text.startswith("~"), "the path starts at a home folder; paths are relative to the root"),
        ("://" in text, "the path is a URL; only files below the root are read"),
        (".." in text.split("/"), "the path climbs with '..'"),
    ):
        if unsafe:
            raise UnsafePathError("PATH_UNSAFE", reason)
    return "/".join(part for part in text.split("/") if part not in {"", "."})


def resolve(root: Path, relative: str) -> str:
    """The path of a plain file with all links followed, relative to `root`, without opening it.

    Raises:
        UnsafePathError: FILE_MISSING, NOT_A_FILE (folder, pipe, socket, device, circle of links) or PATH_UNSAFE (a link
            that leads out of the root).
    """
    return resolve_into(root, relative)[1]


def resolve_into(root: Path, relative: str, link_roots: Iterable[Path] = ()) -> tuple[str, str]:
    """As `resolve`, but a link may also lead into a folder of `link_roots`.

    Returns:
        The folder that contains the file, without links, and the path of the file relative to it.
    """
    top = os.path.realpath(root)
    try:
        real = os.path.realpath(Path(top, relative), strict=True)
    except FileNotFoundError as error:
        raise UnsafePathError("FILE_MISSING", "no such file below the root") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafePathError("NOT_A_FILE", "a circle of links") from error
        if error.errno in {errno.ENOTDIR, errno.ENAMETOOLONG}:
            raise UnsafePathError("FILE_MISSING", f"no such file below the root ({error.strerror})") from error
        raise UnsafePathError("FILE_UNREADABLE", f"cannot be reached: {error.strerror}") from error
    for folder in (top, *map(os.path.realpath, link_roots)):
        if real.startswith(folder.rstrip(os.sep) + os.sep):
            _check_mode(os.lstat(real).st_mode)
            return folder, os.path.relpath(real, folder)
    raise UnsafePathError(
        "PATH_UNSAFE",
        "a link leads out of the root; not opened; replace it by a copy of the file, or list its folder in ingest.link_roots",
    )


def find_other_normal_form(root: Path, name: str) -> str:
    """Name of the file on disk that differs from a missing `name` in its Unicode normal form alone; otherwise `name`.

    Linux compares bytes, macOS decomposes letters with accents, and tables usually hold composed ones.
    """
    if name.isascii() or os.path.lexists(root / name):
        return name
    found = ""
    for part in name.split("/"):
        step = f"{found}{part}"
        if not os.path.lexists(root / step):
            composed = unicodedata.normalize("NFC", part)
            with suppress(OSError):
                forms = [
                    entry.name for entry in (root / found).iterdir() if unicodedata.normalize("NFC", entry.name) == composed
                ]
                if len(forms) == 1 and (root / found).resolve().is_relative_to(root.resolve()):
                    step = f"{found}{forms[0]}"
        found = f"{step}/"
    return found.rstrip("/") if os.path.lexists(root / found.rstrip("/")) else name


def kind_of_file(mode: int) -> str:
    """Name of a kind of file by its mode."""
    kinds = (
        (stat.S_ISREG, "a plain file"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"), (stat.S_ISLNK, "a link"),
    )  # fmt: skip
    return next((text for test, text in kinds if test(mode)), "a device")


def _check_mode(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UnsafePathError("NOT_A_FILE", f"{kind_of_file(mode)}, not a plain file; it was not opened")


def open_regular_file(root: Path, relative: str) -> BinaryIO:
    """Open a plain file below `root` for reading; `relative` is what `resolve` returned, so no link is left in it.

    Raises:
        UnsafePathError: as `resolve`, or FILE_UNREADABLE.
    """
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the root itself is trusted and must be there
    try:
        *folders, name = relative.split("/")
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        _check_mode(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        # O_NONBLOCK: if a pipe replaces the file now, the open does not wait for a writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError as error:
        raise UnsafePathError("FILE_MISSING", "no such file below the root") from error
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise UnsafePathError("PATH_UNSAFE", "a link was created in the path; it was not opened") from error
        raise UnsafePathError("FILE_UNREADABLE", f"cannot be opened: {error.strerror}") from error
    finally:
        os.close(folder)
    handle = os.fdopen(descriptor, "rb")
    try:
        _check_mode(os.fstat(descriptor).st_mode)
    except UnsafePathError:
        handle.close()
        raise
    return handle


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Hash, size and first bytes of a file."""

    sha256: str
    size: int
    head: bytes


def digest_file(handle: BinaryIO, head: int = 512) -> FileDigest:
    """sha256, size in bytes and the first `head` bytes of an open file, read in blocks; the position returns to 0."""
    first = handle.read(head)
    handle.seek(0)
    digest = hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]  # every handle here has readinto
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    return FileDigest(digest, size, first)


def walk_untrusted(root: Path) -> Iterator[tuple[str, Literal["file", "folder", "unreadable"]]]:
    """Every name below `root` as (path relative to root, what it is). "file" is everything except folders.

    Links are listed and never followed; hidden folders are listed and not entered. Sorted by bytes of the name.
    """
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(Path(root, folder)) as entries:
                found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError:
            yield folder or ".", "unreadable"
            continue
        inner: list[str] = []
        for entry in found:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            yield relative, "folder" if is_folder else "file"
            if is_folder and not entry.name.startswith("."):
                inner.append(relative)
        waiting.extend(reversed(inner))


def file_size(handle: BinaryIO) -> int:
    """Bytes in an open file; the position is kept."""
    here = handle.tell()
    size = handle.seek(0, os.SEEK_END)
    handle.seek(here)
    return size
