"""Result cache: stored results of items, so that none is computed twice.

Append-only store of Parquet parts per (stage, fingerprint). The fingerprint covers everything except the item
(model, revision, version, parameters); the key is the item. Parts are content-named and written atomically, so any number of
processes may append, a killed stage keeps its finished results, and several machines may use one folder through any fsspec URL.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline_steps.core.atomic import write_bytes
from pipeline_steps.core.errors import ResourceError, ServiceError, StageError
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.core.tables import PARQUET

log = logging.getLogger(__name__)

READERS, READ_AHEAD = 4, 64
"""Threads that read, check and decode parts, and the number of parts read ahead."""


class ResultCache:
    """Results by key for one (stage, fingerprint). `schema` describes the value columns; `key` is added.

    Args:
        url: folder or fsspec URL of the store, e.g. `.cache/items` or `s3://team/items`.
        stage: stage name, the first folder level.
        fingerprint: of everything except the item that determines a result.
        schema: Arrow schema of the values.
    """

    def __init__(self, url: str, stage: str, fingerprint: str, schema: pa.Schema) -> None:
        self.schema = pa.schema([pa.field("key", pa.string(), nullable=False), *schema])
        self.fingerprint = fingerprint
        self._fs, root = fsspec.core.url_to_fs(str(url))
        self._folder = f"{root.rstrip('/')}/{stage}/{fingerprint}"
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    def load(self, keys: Iterable[str], columns: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """Cached results of `keys`, with all value columns or `columns`. A damaged part is renamed to `*.damaged` and ignored.

        Raises:
            ResourceError, ServiceError: a part could not be read (local, remote store), whatever its content.
        """
        names = list(self.schema.names[1:]) if columns is None else list(columns)
        found: dict[str, dict[str, Any]] = {}
        for table in self._parts(set(keys), names):
            for row in table.to_pylist():
                found[row.pop("key")] = row
        return found

    def vectors(self, keys: Iterable[str], column: str = "vector") -> dict[str, npt.NDArray[Any]]:
        """Cached lists of numbers of `keys` as read-only arrays of the column's type, without Python objects per number."""
        found: dict[str, npt.NDArray[Any]] = {}
        for table in self._parts(set(keys), [column]):
            lists = table[column].combine_chunks()
            numbers, bounds = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy().tolist()
            for key, start, end in zip(table["key"].to_pylist(), bounds, bounds[1:], strict=False):
                found[key] = numbers[start:end]
        return found

    def _parts(self, wanted: set[str], names: list[str]) -> Iterator[pa.Table]:
        """Rows of each part whose key is in `wanted`, with columns `names`."""
        if not wanted:
            return
        self._fs.invalidate_cache(self._folder)  # other processes append too, and fsspec caches listings
        if not self._fs.isdir(self._folder):
            return
        schema = pa.schema([self.schema.field(name) for name in ("key", *names)])
        try:
            paths = sorted(path for path in self._fs.ls(self._folder, detail=False) if path.endswith(".parquet"))
        except OSError as error:
            raise self._unread(self._folder, error) from error
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(paths), READ_AHEAD):
                group = paths[start : start + READ_AHEAD]
                for path, table in zip(group, readers.map(lambda path: self._table(path, schema), group), strict=True):
                    if isinstance(table, Exception):
                        log.warning(
                            "cache part %s is damaged (%s); renamed to *.damaged, its items will be computed again", path, table
                        )
                        with contextlib.suppress(FileNotFoundError):  # another reader has renamed it
                            self._fs.mv(path, path + ".damaged")
                        continue
                    if table is None:
                        continue
                    # A lookup per key of the part, not one table of all wanted keys per part.
                    rows = [row for row, key in enumerate(table["key"].to_pylist()) if key in wanted]
                    if rows:
                        yield table if len(rows) == table.num_rows else table.take(rows)

    def _table(self, path: str, schema: pa.Schema) -> pa.Table | Exception | None:
        """Columns of a part; the error if its content is damaged; None if another reader has renamed it."""
        try:
            payload = self._fs.cat_file(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unread(path, error) from error
        try:
            if sha256_bytes(payload)[:32] != path.rsplit("/", 1)[-1].removesuffix(".parquet"):
                raise pa.ArrowInvalid("content does not match its name")
            table = pq.ParquetFile(pa.BufferReader(payload)).read(schema.names, use_threads=False)
            return table if table.schema == schema else table.select(schema.names).cast(schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, KeyError, ValueError, OSError) as error:
            return error

    def _unread(self, path: str, error: OSError) -> StageError:
        kind = ResourceError if self._local else ServiceError
        action = "fix the cause and run again; no cache part was renamed"
        return kind(f"{path}: cache part cannot be read: {error.strerror or error}", action, transient=True)

    def append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Store results by key, atomically, as one part."""
        if not rows:
            return
        table = pa.Table.from_pylist([{"key": key, **rows[key]} for key in sorted(rows)], schema=self.schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, **PARQUET)
        payload = buffer.getvalue()
        self._fs.makedirs(self._folder, exist_ok=True)
        name = f"{self._folder}/{sha256_bytes(payload)[:32]}.parquet"
        if self._local:
            write_bytes(Path(name), payload)
        else:  # object stores write objects atomically
            self._fs.pipe_file(name, payload)
