"""Metadata table: file, license, author, source, group and text of each item. Only configured columns are read."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline_steps.core.escape import clean_text
from pipeline_steps.core.safe_paths import open_regular_file

RowFilter = dict[str, tuple[str, ...]]
"""Column -> values of the rows to select. All columns must match."""

MAX_FIELD = 1 << 20
MAX_TEXT_CHARS = 1000
"""Limit of the words of an item."""
GROUP_SEPARATOR = "\x1f"


class MetadataQuery(NamedTuple):
    """Columns and filters to read. Several columns are joined."""

    file: str
    license: str | None
    author: str | None
    source: tuple[str, ...]
    group: tuple[str, ...]
    pool: RowFilter | None
    holdout: RowFilter | None
    text: tuple[str, ...] = ()

    def columns(self) -> dict[str, str]:
        """Distinct names of all columns to read, each with the first key of the configuration that names it."""
        keys: list[tuple[str, tuple[str | None, ...]]] = [
            ("file", (self.file,)),
            ("license", (self.license,)),
            ("author", (self.author,)),
        ]
        keys += [("source", self.source), ("group", self.group), ("text", self.text)]
        found: dict[str, str] = {}
        for key, names in keys:
            for name in filter(None, names):
                found.setdefault(name, f"columns.{key}")
        for key, rows in (("pool", self.pool), ("holdout", self.holdout)):
            for name in rows or {}:
                found.setdefault(name, key)
        return found


class MetadataRow(NamedTuple):
    """Row in the pool or held out. `line` counts rows from 1, without the header."""

    file: str
    license: str | None
    author: str | None
    source: str | None
    group: str | None
    holdout: bool
    line: int
    text: str | None = None


class MetadataTableJob(NamedTuple):
    """Metadata table to read in a worker."""

    root: str
    relative: str
    query: MetadataQuery


def read_metadata_table(job: MetadataTableJob) -> dict[str, object]:
    """Read a CSV (UTF-8, header line) or Parquet table; runs in a worker.

    Returns:
        {"rows": [MetadataRow...], "filtered": rows in neither filter}, or {"error": text} for an unusable table.
    """
    with open_regular_file(Path(job.root), job.relative) as handle:
        try:
            read = _parquet_rows if job.relative.lower().endswith((".parquet", ".pq")) else _csv_rows
            rows, filtered = filter_rows(read(handle, job.query.columns()), job.query)
        except (ValueError, csv.Error, OSError) as error:  # pyarrow's errors are ValueErrors, of a wrong page checksum OSError
            return {"error": f"{type(error).__name__}: {error}" if type(error) is not ValueError else str(error)}
    return {"rows": rows, "filtered": filtered}


def _check_columns(columns: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise a ValueError that lists every missing column with the key that names it."""
    missing = []
    for column in (column for column in columns if column not in names):
        close = difflib.get_close_matches(column, names, n=1)
        missing.append(f"no column {column!r} ({columns[column]}{f'; did you mean {close[0]!r}?' if close else ''})")
    if missing:
        raise ValueError(f"{', '.join(missing)}; it has {', '.join(names) or 'no columns'}")


def _csv_rows(handle: BinaryIO, columns: Mapping[str, str]) -> Iterator[dict[str, str]]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(io.TextIOWrapper(handle, encoding="utf-8-sig", newline=""), strict=True)
    header = next(reader, [])
    _check_columns(columns, header)
    indices = [(column, header.index(column)) for column in columns]
    for number, row in enumerate(reader, 1):
        if not any(cell.strip() for cell in row):  # an empty line, or the commas that a spreadsheet leaves of one
            continue
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} fields, the header has {len(header)}")
        yield {column: row[index] for column, index in indices}


def _parquet_rows(handle: BinaryIO, columns: Mapping[str, str]) -> Iterator[dict[str, str]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(handle, page_checksum_verification=True)
    _check_columns(columns, table.schema_arrow.names)
    for batch in table.iter_batches(columns=list(columns)):
        for row in batch.to_pylist():
            values = {name: _cell_text(value) for name, value in row.items()}
            if any(value.strip() for value in values.values()):
                yield values


def _cell_text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(filter(None, map(_cell_text, value)))
    return "" if value is None or isinstance(value, dict) else str(value)


def join_texts(values: Iterable[object]) -> str | None:
    """Words of an item from several cells, cleaned and without repetitions: at most `MAX_TEXT_CHARS` characters."""
    texts = dict.fromkeys(clean_text(_cell_text(value), MAX_TEXT_CHARS) for value in values)
    return clean_text("; ".join(filter(None, texts)), MAX_TEXT_CHARS) or None


def matches_filter(row: Mapping[str, str], rows: RowFilter | None) -> bool:
    """Whether a row has one of the filter's values in every column of the filter."""
    return rows is not None and all(row[column] in values for column, values in rows.items())


def filter_rows(rows: Iterable[Mapping[str, str]], query: MetadataQuery) -> tuple[list[MetadataRow], int]:
    """Rows in the pool or held out, and the number of the others. A row in both filters is held out."""
    selected: list[MetadataRow] = []
    filtered = 0
    for line, row in enumerate(rows, 1):
        holdout = matches_filter(row, query.holdout)
        if not holdout and query.pool is not None and not matches_filter(row, query.pool):
            filtered += 1
            continue
        selected.append(
            MetadataRow(
                file=row[query.file],
                license=(row[query.license].strip() or None) if query.license else None,
                author=(row[query.author].strip() or None) if query.author else None,
                source=_join(row, query.source, "/"),
                group=_join(row, query.group, GROUP_SEPARATOR),
                holdout=holdout,
                line=line,
                text=join_texts(row[column] for column in query.text),
            )
        )
    return selected, filtered


def _join(row: Mapping[str, str], columns: Sequence[str], separator: str) -> str | None:
    values = [row[column].strip() for column in columns]
    return separator.join(values) if any(values) else None
