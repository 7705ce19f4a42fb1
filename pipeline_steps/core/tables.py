"""Parquet tables: validated against their schema, sorted by key, written with fixed options (same rows, same bytes)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline_steps.core.atomic import atomic_path
from pipeline_steps.core.checksums import damaged, verified_sha256
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.schemas import TableSchema

ROW_GROUP = 64 * 1024

PARQUET: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
"""Options of every Parquet file that the project writes."""

ORDERED_ROWS = 500_000
"""Number of rows from which a table is tested for order before it is sorted, because sorting strings is slow."""


def to_table(contract: TableSchema, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows (dicts) as a table of the contract's schema, sorted by its key.

    Raises:
        DataError: a value does not fit the schema, a null in a non-null column, or a duplicate key.
    """
    try:
        table = pa.Table.from_pylist(list(rows), schema=contract.schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as error:
        raise DataError(f"rows do not fit table {contract.name}: {error}") from error
    return validate_table(contract, table, f"new {contract.name}")


def validate_table(contract: TableSchema, table: pa.Table, where: str) -> pa.Table:
    """Return `table` with the contract's columns, sorted by key, or raise DataError naming the column."""
    for name in contract.optional:
        if name not in table.column_names:
            field = contract.schema.field(name)
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    missing = [name for name in contract.schema.names if name not in table.column_names]
    if missing:
        raise DataError(f"{where}: column {missing[0]!r} is missing", "rebuild it with the stage that writes it")
    for field in contract.schema:
        column = table[field.name]
        if column.type != field.type:
            raise DataError(f"{where}: column {field.name!r} has type {column.type}, expected {field.type}")
        if not field.nullable and column.null_count:
            raise DataError(f"{where}: column {field.name!r} has {column.null_count} empty values")
    table = table.select(contract.schema.names).cast(contract.schema)
    if table.num_rows >= ORDERED_ROWS and _is_strictly_sorted(table, contract.key):
        return table.combine_chunks()
    table = table.sort_by([(name, "ascending") for name in contract.key])
    if contract.unique and table.num_rows > 1:
        keys = table.select(list(contract.key)).group_by(list(contract.key)).aggregate([([], "count_all")])
        if keys.num_rows != table.num_rows:
            raise DataError(f"{where}: key {contract.key} is not unique")
    return table


def _is_strictly_sorted(table: pa.Table, key: tuple[str, ...]) -> bool:
    """Whether every row has a larger key than the row before."""
    larger: Any = None
    for name in reversed(key):
        before, after = table[name].slice(0, table.num_rows - 1), table[name].slice(1)
        here = pc.less(before, after)
        larger = here if larger is None else pc.or_(here, pc.and_(pc.equal(before, after), larger))
    return bool(pc.all(larger).as_py())


def write_table(path: Path, contract: TableSchema, rows: Iterable[Mapping[str, Any]] | pa.Table) -> pa.Table:
    """Validate, sort and write a table atomically; returns the written table."""
    table = validate_table(contract, rows, str(path)) if isinstance(rows, pa.Table) else to_table(contract, rows)
    empty = [name for name in contract.optional if table[name].null_count == table.num_rows]
    with atomic_path(path) as temporary:
        pq.write_table(table.drop_columns(empty), temporary, row_group_size=ROW_GROUP, write_statistics=True, **PARQUET)
    return table


def read_table(path: Path, contract: TableSchema) -> pa.Table:
    """Read a table and check its bytes, by the checksums of its folder and of its pages, and its contract.

    Raises:
        DataError: the file is missing, or a column is missing, of another type, or empty.
        IntegrityError: the file is damaged.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing", f"run the stage that writes it: dvc repro (table {contract.name})")
    verified_sha256(path)
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise damaged(path, f"not a readable Parquet file: {error}") from error
    return validate_table(contract, table, str(path))
