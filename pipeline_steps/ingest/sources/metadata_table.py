"""The metadata table: which files, under which license, in which group. Only configured columns are taken from it."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline_steps.core.safe_paths import open_regular_file

Filter = Mapping[str, str | Sequence[str]]
MAX_FIELD = 1 << 20
SEPARATOR = "\x1f"


class MetadataQuery(NamedTuple):
    """Columns to take: a name, several to join, or None."""

    file: str
    license: str | None
    author: str | None
    source: tuple[str, ...]
    group: tuple[str, ...]
    pool: dict[str, tuple[str, ...]] | None
    holdout: dict[str, tuple[str, ...]] | None

    def columns(self) -> list[str]:
        """Every column that is read, without repetition."""
        names = [self.file, *(name for name in (self.license, self.author) if name), *self.source, *self.group]
        for rows in (self.pool, self.holdout):
            names.extend(rows or {})
        return list(dict.fromkeys(names))


class MetadataRow(NamedTuple):
    """One row of the table that is in the pool or held out. `line` counts rows from 1, without the header."""

    file: str
    license: str | None
    author: str | None
    source: str | None
    group: str | None
    holdout: bool
    line: int


class MetadataTableJob(NamedTuple):
    """A table to read inside a decoding process."""

    root: str
    relative: str
    wanted: MetadataQuery


def read_metadata_table(job: MetadataTableJob) -> dict[str, object]:
    """Read a CSV (UTF-8, header line) or Parquet table; runs in a decoding process.

    Returns:
        {"rows": [Listed...], "ignored": rows in neither filter} or {"error": text} for a table that cannot be used.
    """
    with open_regular_file(Path(job.root), job.relative) as handle:
        try:
            columns = job.wanted.columns()
            reader = _parquet_rows if job.relative.lower().endswith((".parquet", ".pq")) else _csv_rows
            rows, ignored = filter_rows(reader(handle, columns), job.wanted)
        except (ValueError, csv.Error) as error:  # pyarrow's errors are ValueErrors, UnicodeDecodeError is one too
            return {"error": f"{type(error).__name__}: {error}" if type(error) is not ValueError else str(error)}
    return {"rows": rows, "ignored": ignored}


def _missing(column: str, known: Sequence[str]) -> ValueError:
    close = difflib.get_close_matches(column, known, n=1)
    return ValueError(f"no column {column!r}" + (f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"))


def _csv_rows(handle: BinaryIO, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(io.TextIOWrapper(handle, encoding="utf-8-sig", newline=""), strict=True)
    header = next(reader, [])
    for column in columns:
        if column not in header:
            raise _missing(column, header)
    places = [(column, header.index(column)) for column in columns]
    for number, row in enumerate(reader, 1):
        if not row:
            continue
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} fields, the header has {len(header)}")
        yield {column: row[place] for column, place in places}


def _parquet_rows(handle: BinaryIO, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    import pyarrow.parquet as pq

    table = pq.ParquetFile(handle)
    for column in columns:
        if column not in table.schema_arrow.names:
            raise _missing(column, table.schema_arrow.names)
    for batch in table.iter_batches(columns=list(columns)):
        for row in batch.to_pylist():
            yield {name: "" if value is None else str(value) for name, value in row.items()}


def matches_filter(row: Mapping[str, str], rows: Mapping[str, tuple[str, ...]] | None) -> bool:
    """Whether a row has one of the wanted values in every column of the filter."""
    return rows is not None and all(row[column] in values for column, values in rows.items())


def filter_rows(rows: Iterable[Mapping[str, str]], wanted: MetadataQuery) -> tuple[list[MetadataRow], int]:
    """Rows of the pool or held out, and the number of the others. A row in both filters is held out."""
    taken: list[MetadataRow] = []
    ignored = 0
    for line, row in enumerate(rows, 1):
        holdout = matches_filter(row, wanted.holdout)
        if not holdout and wanted.pool is not None and not matches_filter(row, wanted.pool):
            ignored += 1
            continue
        taken.append(
            MetadataRow(
                file=row[wanted.file],
                license=(row[wanted.license].strip() or None) if wanted.license else None,
                author=(row[wanted.author].strip() or None) if wanted.author else None,
                source=_join(row, wanted.source, "/"),
                group=_join(row, wanted.group, SEPARATOR),
                holdout=holdout,
                line=line,
            )
        )
    return taken, ignored


def _join(row: Mapping[str, str], columns: Sequence[str], separator: str) -> str | None:
    values = [row[column].strip() for column in columns]
    return separator.join(values) if any(values) else None
