"""Candidates among files: listed by a table, or found by walking the root. Opens, hashes and checks signatures only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.hashing import ID_LENGTH
from pipeline_steps.core.safe_paths import (
    UnsafePathError,
    check_encoding,
    digest_file,
    display_path,
    find_other_normal_form,
    open_regular_file,
    resolve_into,
    validate_relative_path,
    walk_untrusted,
)
from pipeline_steps.ingest.candidates import CandidateFile, DiscoveryResult, RejectedFile
from pipeline_steps.ingest.file_signatures import (
    check_format,
    extension,
    has_media_extension,
    is_candidate,
    kind_from_extension,
    read_head,
)
from pipeline_steps.ingest.reason_codes import RejectedItemError
from pipeline_steps.ingest.sources.metadata_table import MetadataRow, join_texts
from pipeline_steps.ingest.worker_pool import core_count


def discover_files(
    root: Path,
    rows: Iterable[MetadataRow] | None,
    max_image_bytes: float,
    skip: tuple[str, ...] = (),
    link_roots: tuple[Path, ...] = (),
) -> DiscoveryResult:
    """Inspect every listed file or, without a list, every file below `root`.

    Args:
        root: folder that no path may leave, except through a link.
        rows: rows of a metadata table, or None to walk the tree.
        max_image_bytes: larger image files are rejected before decoding.
        skip: folders ("name/") that a walk leaves out.
        link_roots: folders outside `root` into which a link may lead.
    """
    result = DiscoveryResult()
    names = _walk(root, result, skip) if rows is None else ((row.file, row) for row in unique_rows(rows))

    def inspect(entry: tuple[str, MetadataRow | None]) -> CandidateFile | RejectedFile | str:
        return inspect_file(root, *entry, max_image_bytes, walked=rows is None, link_roots=link_roots)

    with ThreadPoolExecutor(core_count()) as pool:  # hashing releases the interpreter lock
        for found in pool.map(inspect, names):
            if isinstance(found, CandidateFile):
                result.files.append(found)
            elif isinstance(found, RejectedFile):
                result.rejected.append(found)
            else:
                result.skipped_files[found] += 1
    return result


def unique_rows(rows: Iterable[MetadataRow]) -> list[MetadataRow]:
    """Metadata rows with normalized paths, one per file. Texts of repeated rows are joined.

    Raises:
        DataError: two rows describe one file differently.
    """
    by_file: dict[str, MetadataRow] = {}
    for row in rows:
        with suppress(UnsafePathError):  # an unsafe path is rejected when it is inspected
            row = row._replace(file=validate_relative_path(row.file))
        other = by_file.setdefault(row.file, row)
        fields = [name for name in row._fields if name not in ("line", "text") and getattr(row, name) != getattr(other, name)]
        if row.text != other.text:
            by_file[row.file] = other._replace(text=join_texts((other.text, row.text)))
        if fields:
            raise DataError(
                f"rows {other.line} and {row.line} of the metadata table both describe {display_path(row.file)} "
                f"and differ in {', '.join(fields)}",
                "keep one of them; nothing was written",
            )
    return list(by_file.values())


def extension_label(name: str) -> str:
    """Key of `skipped_files` for a file name."""
    return f".{extension(name)}" if extension(name) else "no extension"


def _walk(root: Path, result: DiscoveryResult, skip: tuple[str, ...]) -> Iterator[tuple[str, None]]:
    """Names of the plain files below `root`; other entries are added to `result`."""
    for name, what in walk_untrusted(root):
        if skip and f"{name}/".startswith(skip):
            continue
        if what == "unreadable":
            result.rejected.append(
                RejectedFile(display_path(name), "unknown", "FILE_UNREADABLE", "the folder cannot be listed")
            )
        elif name.rsplit("/", 1)[-1].startswith("."):
            result.skipped_files["hidden"] += 1
        elif what == "file":
            yield name, None
        elif has_media_extension(name):
            reason = "a folder with a media extension; the files inside are inspected separately"
            result.rejected.append(RejectedFile(display_path(name), kind_from_extension(name), "NOT_A_FILE", reason))


def inspect_file(
    root: Path, name: str, row: MetadataRow | None, max_image_bytes: float, walked: bool, link_roots: tuple[Path, ...] = ()
) -> CandidateFile | RejectedFile | str:
    """Open, hash and check one file, described by a metadata row or found by a walk.

    Returns:
        The candidate, the rejected file, or the extension of a file that a walk skips because it is no media.
    """
    displayed = display_path(name)
    item_id = ""
    size = 0
    try:
        check_encoding(name)
        if row:
            name = find_other_normal_form(root, validate_relative_path(name))
            displayed = display_path(name)
        folder, relative = resolve_into(root, name, link_roots)
        with open_regular_file(Path(folder), relative) as handle:
            head = read_head(handle)
            if walked and not is_candidate(name, head):
                return extension_label(name)
            digest = digest_file(handle)
        item_id, size = digest.sha256[:ID_LENGTH], digest.size
        kind, form = check_format(name, head, size, max_image_bytes)
    except (UnsafePathError, RejectedItemError) as error:
        return RejectedFile(displayed, kind_from_extension(name), error.code, error.reason, size, item_id)
    except OSError as error:
        reason = f"reading failed: {error.strerror or error}"
        return RejectedFile(displayed, kind_from_extension(name), "FILE_UNREADABLE", reason)
    metadata = (row.license, row.author, row.source, row.group, row.holdout, None, row.text) if row else ()
    return CandidateFile(folder, relative, displayed, digest.sha256, size, kind, form, *metadata)
