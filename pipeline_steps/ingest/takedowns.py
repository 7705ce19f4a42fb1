"""Take-downs: `forgotten.csv` in the pool's root lists contents that must not come back, whatever file or archive holds them.

Items are named by the hash of their bytes, so a copy under another name is refused too. A file that was changed by a single
byte is another content; whoever must keep those out removes the source. The list holds no names, only ids and reasons.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.hashing import ID_LENGTH
from pipeline_steps.core.safe_paths import UnsafePathError, open_regular_file
from pipeline_steps.ingest.catalog import RejectedFile
from pipeline_steps.ingest.sources.file_walk import DiscoveryResult

NAME = "forgotten.csv"
COLUMNS = ("item_id", "kind", "time", "reason")
MAX_BYTES = 50_000_000


def parse_takedowns(text: str) -> frozenset[str]:
    """Ids of the list.

    Raises:
        DataError: the column is missing or holds something that is no id; a list that cannot be read must not pass for empty.
    """
    reader = csv.DictReader(io.StringIO(text))
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{NAME} cannot be read after line {reader.line_num}: {error}", "mend the row") from error
    if "item_id" not in (reader.fieldnames or []):
        raise DataError(f"{NAME} has no column item_id", f"its header is {','.join(COLUMNS)}")
    found = set()
    for number, row in enumerate(rows, 1):
        item = (row["item_id"] or "").strip()
        if len(item) != ID_LENGTH or set(item) - set("0123456789abcdef"):
            raise DataError(f"{NAME}: row {number} holds no item id but {item[:40]!r}", "mend or remove the row")
        found.add(item)
    return frozenset(found)


def append_rows(text: str, rows: Iterable[tuple[str, str, str, str]]) -> str:
    """The list with further rows (id, kind, time, reason); an id that is there already is not repeated."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    if not text.strip():
        writer.writerow(COLUMNS)
    known = parse_takedowns(text) if text.strip() else frozenset()
    writer.writerows(row for row in rows if row[0] not in known)
    return (text if not text or text.endswith("\n") else text + "\n") + stream.getvalue()


def load_takedowns(root: Path) -> str | None:
    """The list in `root`, None when there is none.

    Raises:
        DataError: something is there that cannot be read or is no plain file, such as a link that leads nowhere.
    """
    try:
        with open_regular_file(root, NAME) as handle:
            payload = handle.read(MAX_BYTES + 1)
    except UnsafePathError as error:
        if error.code == "FILE_MISSING":
            return None
        raise DataError(f"{NAME} cannot be read: {error.reason}", "put the list itself there, or remove it") from error
    except OSError as error:
        raise DataError(f"{NAME} cannot be read: {error.strerror or error}", "mend that and run again") from error
    if len(payload) > MAX_BYTES:
        raise DataError(f"{NAME} is larger than {MAX_BYTES} bytes", "it lists one item a row")
    return payload.decode("utf-8-sig", errors="replace")


def apply_takedowns(root: Path, found: DiscoveryResult) -> None:
    """Refuse what the list in `root` names, before anything decodes it or asks the memo; no list, nothing to do.

    Raises:
        DataError: the list cannot be read.
    """
    text = load_takedowns(root)
    gone = frozenset[str]() if text is None else parse_takedowns(text)
    refused = [file for file in found.files if file.item in gone]
    found.files = [file for file in found.files if file.item not in gone]
    found.refused += [
        RejectedFile(file.shown, file.kind, "FORGOTTEN", f"listed in {NAME}", file.bytes, file.item) for file in refused
    ]
