"""Memo: what was computed once for an item is not computed again.

An append-only store of Parquet parts per (stage, fingerprint). The fingerprint holds everything but the item (model,
revision, version, parameters); the key is the item. Parts are content-named and written atomically, so any number of
processes may append, a killed stage keeps what it had, and a team may share the folder through any fsspec URL.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline_steps.core.identity import sha256_bytes

log = logging.getLogger(__name__)


class Memo:
    """Results by key for one (stage, fingerprint). `schema` describes the value columns; `key` is added.

    Args:
        url: folder or fsspec URL of the store, e.g. `.cache/items` or `s3://team/items`.
        stage: stage name, the first folder level.
        fingerprint: of everything but the item that shapes a result.
        schema: Arrow schema of the values.
    """

    def __init__(self, url: str, stage: str, fingerprint: str, schema: pa.Schema) -> None:
        self.schema = pa.schema([pa.field("key", pa.string(), nullable=False), *schema])
        self._fs, root = fsspec.core.url_to_fs(str(url))
        self._folder = f"{root.rstrip('/')}/{stage}/{fingerprint}"
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    def load(self, keys: Iterable[str], columns: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
        """Known results among `keys`, all value columns or `columns`. A damaged part is set aside, its items computed again."""
        chosen = None if columns is None else ["key", *columns]
        wanted = pa.array(sorted(set(keys)), pa.string())
        found: dict[str, dict[str, Any]] = {}
        if not len(wanted) or not self._fs.isdir(self._folder):
            return found
        for path in sorted(self._fs.ls(self._folder, detail=False)):
            if not path.endswith(".parquet"):
                continue
            try:
                payload = self._fs.cat_file(path)
                if sha256_bytes(payload)[:32] != path.rsplit("/", 1)[-1].removesuffix(".parquet"):
                    raise pa.ArrowInvalid("content does not match its name")
                table = pq.read_table(io.BytesIO(payload), columns=chosen, schema=self.schema)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
                log.warning("memo part %s is damaged (%s); set aside, its items will be computed again", path, error)
                self._fs.mv(path, path + ".damaged")
                continue
            table = table.filter(pc.is_in(table["key"], value_set=wanted))
            for row in table.to_pylist():
                found[row.pop("key")] = row
        return found

    def append(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Store results by key, atomically, as one part."""
        if not rows:
            return
        table = pa.Table.from_pylist([{"key": key, **rows[key]} for key in sorted(rows)], schema=self.schema)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        payload = buffer.getvalue()
        self._fs.makedirs(self._folder, exist_ok=True)
        name = f"{self._folder}/{sha256_bytes(payload)[:32]}.parquet"
        if self._local:
            from pathlib import Path

            from pipeline_steps.core.atomic import write_bytes

            write_bytes(Path(name), payload)
        else:  # object stores put a whole object or none
            self._fs.pipe_file(name, payload)
