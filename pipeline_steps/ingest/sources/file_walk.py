"""Names -> files worth decoding. Opens and hashes through `core.rawfiles`; compares signatures; parses nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.hashing import ID_LENGTH
from pipeline_steps.core.safe_paths import (
    UnsafePathError,
    check_encoding,
    digest_file,
    display_path,
    open_regular_file,
    resolve,
    validate_relative_path,
    walk_untrusted,
)
from pipeline_steps.ingest.catalog import CandidateFile, RejectedFile
from pipeline_steps.ingest.file_signatures import check_format, extension, has_media_name, is_candidate, kind_of_name
from pipeline_steps.ingest.reason_codes import RejectedItemError
from pipeline_steps.ingest.sources.metadata_table import MetadataRow


@dataclass
class DiscoveryResult:
    """What lies below the root: files to decode, names refused, and files passed over, by extension."""

    files: list[CandidateFile] = field(default_factory=list)
    refused: list[RejectedFile] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """Candidates that went in."""
        return len(self.files) + len(self.refused)

    def add(self, other: DiscoveryResult) -> None:
        """Take in what was found elsewhere."""
        self.files += other.files
        self.refused += other.refused
        self.passed_over += other.passed_over


def discover(
    root: Path, listed: Iterable[MetadataRow] | None, max_picture_bytes: float, threads: int, skip: tuple[str, ...] = ()
) -> DiscoveryResult:
    """Inspect every listed file or, without a list, every file below `root`.

    Args:
        root: folder nothing may lead out of.
        listed: rows of the metadata table, or None to walk the tree.
        max_picture_bytes: larger picture files are refused without being decoded.
        threads: hashing threads.
        skip: folders ("name/") that a walk leaves out.
    """
    found = DiscoveryResult()
    names = _walked(root, found, skip) if listed is None else ((row.file, row) for row in unique_files(listed))

    def look(entry: tuple[str, MetadataRow | None]) -> CandidateFile | RejectedFile | str:
        return inspect_file(root, entry[0], entry[1], max_picture_bytes, walked=listed is None)

    with ThreadPoolExecutor(threads) as pool:  # hashing lets go of the interpreter lock
        for answer in pool.map(look, names):
            if isinstance(answer, CandidateFile):
                found.files.append(answer)
            elif isinstance(answer, RejectedFile):
                found.refused.append(answer)
            else:
                found.passed_over[answer] += 1
    return found


def unique_files(listed: Iterable[MetadataRow]) -> list[MetadataRow]:
    """Rows with repetitions of the same row removed.

    Raises:
        DataError: two rows name one file and say different things of it.
    """
    seen: dict[str, MetadataRow] = {}
    for row in listed:
        other = seen.setdefault(row.file, row)
        if other._replace(line=0) != row._replace(line=0):
            fields = [name for name in row._fields if name != "line" and getattr(row, name) != getattr(other, name)]
            raise DataError(
                f"rows {other.line} and {row.line} of the metadata table both describe {display_path(row.file)} "
                f"and differ in {', '.join(fields)}",
                "keep one of them; nothing was written",
            )
    return list(seen.values())


def _walked(root: Path, found: DiscoveryResult, skip: tuple[str, ...]) -> Iterator[tuple[str, None]]:
    for name, what in walk_untrusted(root):
        if skip and f"{name}/".startswith(skip):
            continue
        hidden = name.rsplit("/", 1)[-1].startswith(".")
        if what == "unreadable":
            found.refused.append(RejectedFile(display_path(name), "unknown", "FILE_UNREADABLE", "the folder cannot be listed"))
        elif hidden:
            found.passed_over["hidden"] += 1
        elif what == "file":
            yield name, None
        elif has_media_name(name):
            reason = "a folder named like a media file; the files inside are judged by themselves"
            found.refused.append(RejectedFile(display_path(name), kind_of_name(name), "NOT_A_FILE", reason))


def inspect_file(
    root: Path, name: str, listed: MetadataRow | None, max_picture_bytes: float, walked: bool
) -> CandidateFile | RejectedFile | str:
    """Open, hash and judge one name; a string is the extension of a file that was passed over."""
    shown = display_path(name)
    item = ""
    size = 0
    try:
        check_encoding(name)
        relative = resolve(root, validate_relative_path(name) if listed else name)
        with open_regular_file(root, relative) as handle:
            if walked and not is_candidate(name, handle.read(512)):
                return f".{extension(name)}" if extension(name) else "no extension"
            handle.seek(0)
            seen = digest_file(handle)
        item, size = seen.sha256[:ID_LENGTH], seen.size
        kind, form = check_format(name, seen.head, seen.size)
        if kind == "image" and size > max_picture_bytes:
            raise RejectedItemError("FILE_TOO_LARGE", f"{size / 1e6:.1f} MB, limit {max_picture_bytes / 1e6:g} MB")
    except (UnsafePathError, RejectedItemError) as error:
        return RejectedFile(shown, kind_of_name(name), error.code, error.reason, size, item)
    except OSError as error:
        return RejectedFile(shown, kind_of_name(name), "FILE_UNREADABLE", f"reading failed: {error.strerror or error}")
    file = CandidateFile(relative, shown, seen.sha256, size, kind, form)
    if listed is None:
        return file
    about = {key: getattr(listed, key) for key in ("license", "author", "source", "group", "holdout")}
    return CandidateFile(relative, shown, seen.sha256, size, kind, form, **about)
