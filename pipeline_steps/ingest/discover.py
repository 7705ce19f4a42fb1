"""Names -> files worth decoding. Opens and hashes through `core.rawfiles`; compares signatures; parses nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.identity import ID_LENGTH
from pipeline_steps.core.rawfiles import (
    RawFileError,
    check_encoding,
    glance,
    open_plain,
    resolve,
    safe_relative,
    shown_path,
    walk,
)
from pipeline_steps.ingest.catalog import File, Refused
from pipeline_steps.ingest.codes import RejectedError
from pipeline_steps.ingest.listing import Listed
from pipeline_steps.ingest.sniff import admit, extension, has_media_name, kind_of_name, looks_like_media


@dataclass
class Found:
    """What lies below the root: files to decode, names refused, and files passed over, by extension."""

    files: list[File] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """Candidates that went in."""
        return len(self.files) + len(self.refused)

    def add(self, other: Found) -> None:
        """Take in what was found elsewhere."""
        self.files += other.files
        self.refused += other.refused
        self.passed_over += other.passed_over


def discover(
    root: Path, listed: Iterable[Listed] | None, max_picture_bytes: float, threads: int, skip: tuple[str, ...] = ()
) -> Found:
    """Inspect every listed file or, without a list, every file below `root`.

    Args:
        root: folder nothing may lead out of.
        listed: rows of the metadata table, or None to walk the tree.
        max_picture_bytes: larger picture files are refused without being decoded.
        threads: hashing threads.
        skip: folders ("name/") that a walk leaves out.
    """
    found = Found()
    names = _walked(root, found, skip) if listed is None else ((row.file, row) for row in unique_files(listed))

    def look(entry: tuple[str, Listed | None]) -> File | Refused | str:
        return inspect(root, entry[0], entry[1], max_picture_bytes, walked=listed is None)

    with ThreadPoolExecutor(threads) as pool:  # hashing lets go of the interpreter lock
        for answer in pool.map(look, names):
            if isinstance(answer, File):
                found.files.append(answer)
            elif isinstance(answer, Refused):
                found.refused.append(answer)
            else:
                found.passed_over[answer] += 1
    return found


def unique_files(listed: Iterable[Listed]) -> list[Listed]:
    """Rows with repetitions of the same row removed.

    Raises:
        DataError: two rows name one file and say different things of it.
    """
    seen: dict[str, Listed] = {}
    for row in listed:
        other = seen.setdefault(row.file, row)
        if other._replace(line=0) != row._replace(line=0):
            fields = [name for name in row._fields if name != "line" and getattr(row, name) != getattr(other, name)]
            raise DataError(
                f"rows {other.line} and {row.line} of the metadata table both describe {shown_path(row.file)} "
                f"and differ in {', '.join(fields)}",
                "keep one of them; nothing was written",
            )
    return list(seen.values())


def _walked(root: Path, found: Found, skip: tuple[str, ...]) -> Iterator[tuple[str, None]]:
    for name, what in walk(root):
        if skip and f"{name}/".startswith(skip):
            continue
        hidden = name.rsplit("/", 1)[-1].startswith(".")
        if what == "unreadable":
            found.refused.append(Refused(shown_path(name), "unknown", "FILE_UNREADABLE", "the folder cannot be listed"))
        elif hidden:
            found.passed_over["hidden"] += 1
        elif what == "file":
            yield name, None
        elif has_media_name(name):
            reason = "a folder named like a media file; the files inside are judged by themselves"
            found.refused.append(Refused(shown_path(name), kind_of_name(name), "NOT_A_FILE", reason))


def inspect(root: Path, name: str, listed: Listed | None, max_picture_bytes: float, walked: bool) -> File | Refused | str:
    """Open, hash and judge one name; a string is the extension of a file that was passed over."""
    shown = shown_path(name)
    item = ""
    size = 0
    try:
        check_encoding(name)
        relative = resolve(root, safe_relative(name) if listed else name)
        with open_plain(root, relative) as handle:
            if walked and not looks_like_media(name, handle.read(512)):
                return f".{extension(name)}" if extension(name) else "no extension"
            handle.seek(0)
            seen = glance(handle)
        item, size = seen.sha256[:ID_LENGTH], seen.size
        kind, form = admit(name, seen.head, seen.size)
        if kind == "image" and size > max_picture_bytes:
            raise RejectedError("FILE_TOO_LARGE", f"{size / 1e6:.1f} MB, limit {max_picture_bytes / 1e6:g} MB")
    except (RawFileError, RejectedError) as error:
        return Refused(shown, kind_of_name(name), error.code, error.reason, size, item)
    except OSError as error:
        return Refused(shown, kind_of_name(name), "FILE_UNREADABLE", f"reading failed: {error.strerror or error}")
    file = File(relative, shown, seen.sha256, size, kind, form)
    if listed is None:
        return file
    about = {key: getattr(listed, key) for key in ("licence", "author", "source", "group", "holdout")}
    return File(relative, shown, seen.sha256, size, kind, form, **about)
