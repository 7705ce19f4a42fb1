"""Take-down list: `takedowns.csv` in the pool's root names contents that ingest must reject.

Contents are named by the hash of their bytes, so copies under other names and in archives are rejected too. A file that
differs by one byte is another content; remove its source to keep it out. The list holds ids and reasons, no names.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.hashing import ID_LENGTH
from pipeline_steps.core.safe_paths import UnsafePathError, open_regular_file
from pipeline_steps.ingest.candidates import DiscoveryResult, RejectedFile

NAME = "takedowns.csv"
COLUMNS = ("item_id", "kind", "time", "reason")
MAX_BYTES = 50_000_000


def parse_takedowns(text: str) -> frozenset[str]:
    """Item ids of the list.

    Raises:
        DataError: the column `item_id` is missing or holds an invalid id. An unreadable list is not treated as empty.
    """
    reader = csv.DictReader(io.StringIO(text))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{NAME}: cannot be read after line {reader.line_num}: {error}", "fix the row") from error
    if "item_id" not in (reader.fieldnames or []):
        raise DataError(f"{NAME}: the column item_id is missing", f"use the header {','.join(COLUMNS)}")
    ids = set()
    for number, row in enumerate(rows, 1):
        item = (row["item_id"] or "").strip()
        if len(item) != ID_LENGTH or set(item) - set("0123456789abcdef"):
            raise DataError(f"{NAME}: row {number}: {item[:40]!r} is not an item id", "fix or remove the row")
        ids.add(item)
    return frozenset(ids)


def append_rows(text: str, rows: Iterable[tuple[str, str, str, str]]) -> str:
    """Text of the list with more rows (id, kind, time, reason); ids that it contains already are left out."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    if not text.strip():
        writer.writerow(COLUMNS)
    listed = parse_takedowns(text) if text.strip() else frozenset()
    writer.writerows(row for row in rows if row[0] not in listed)
    return (text if not text or text.endswith("\n") else text + "\n") + stream.getvalue()


def load_takedowns(root: Path) -> str | None:
    """Text of the list in `root`, or None if there is no such file.

    Raises:
        DataError: the file cannot be read or is no regular file, such as a broken link.
    """
    try:
        with open_regular_file(root, NAME) as handle:
            payload = handle.read(MAX_BYTES + 1)
    except UnsafePathError as error:
        if error.code == "FILE_MISSING":
            return None
        raise DataError(f"{NAME}: cannot be read: {error.reason}", "replace it by a regular file, or remove it") from error
    except OSError as error:
        raise DataError(f"{NAME}: cannot be read: {error.strerror or error}", "make it readable and run again") from error
    if len(payload) > MAX_BYTES:
        raise DataError(f"{NAME}: larger than {MAX_BYTES} bytes", "list one item per row")
    return payload.decode("utf-8-sig", errors="replace")


def apply_takedowns(roots: Iterable[Path], result: DiscoveryResult) -> None:
    """Move listed files from `result.files` to `result.rejected`, before they are decoded or read from the cache.

    The list of each root applies to all of them, because it names contents.

    Raises:
        DataError: a list cannot be read.
    """
    texts = [text for text in map(load_takedowns, roots) if text is not None]
    listed = frozenset[str]().union(*map(parse_takedowns, texts))
    result.rejected += [
        RejectedFile(file.path, file.kind, "FORGOTTEN", f"listed in {NAME}", file.bytes, file.item_id)
        for file in result.files
        if file.item_id in listed
    ]
    result.files = [file for file in result.files if file.item_id not in listed]
