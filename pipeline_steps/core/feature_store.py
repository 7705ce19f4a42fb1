"""Feature store: rows of features by key in Arrow files that are mapped into memory and read row by row.

Nothing is held in memory but the places of the rows; processes that read the same files share their pages. Every value has a
CRC-32, which is compared at each read: training touches a row when it needs it, long after the files were opened.
"""

from __future__ import annotations

import logging
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline_steps.core.atomic import write_bytes
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.hashing import sha256_bytes

log = logging.getLogger(__name__)

RowNumbers = npt.NDArray[np.int32]
"""Row numbers; four bytes each, because training holds one for each stored row."""


class FeatureStore:
    """Append-only store of binary values by key, in content-named parts. Any number of processes may append.

    Args:
        folder: of the parts; one per fingerprint of everything but the key that determines a value.
        columns: names of the values.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self.folder, self.columns = Path(folder), tuple(columns)
        binary = [pa.field(name, pa.large_binary(), nullable=False) for name in self.columns]
        checks = pa.field("crc32", pa.list_(pa.uint32(), len(self.columns)), nullable=False)
        self.schema = pa.schema([pa.field("key", pa.string(), nullable=False), *binary, checks])
        self._paths: list[Path] = []
        self._ends: list[int] = []
        self._batches: dict[int, pa.RecordBatch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": {}}  # another process maps the parts itself

    def append(self, rows: Mapping[str, Mapping[str, bytes]]) -> None:
        """Store values by key, atomically, as one part."""
        if not rows:
            return
        keys = sorted(rows)
        values = [[rows[key][name] for key in keys] for name in self.columns]
        checks = [[zlib.crc32(column[row], zlib.crc32(key.encode())) for column in values] for row, key in enumerate(keys)]
        batch = pa.record_batch([keys, *values, checks], schema=self.schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self.schema) as writer:
            writer.write_batch(batch)
        payload = sink.getvalue()
        write_bytes(self.folder / f"{sha256_bytes(payload)[:32]}.arrow", payload)

    def find(self, keys: Sequence[str]) -> RowNumbers:
        """Row numbers of keys, -1 for those that are not stored. Parts that were added meanwhile are opened."""
        known = set(self._paths)
        for path in sorted(self.folder.glob("*.arrow")):
            if path not in known:
                self._open(path)
        stored = [self._batch(part).column("key") for part in range(len(self._paths))]
        places = pc.index_in(pa.array(keys, pa.string()), value_set=pa.chunked_array(stored, pa.string()))
        self._batches.clear()  # pages of the keys are not needed any more; parts are mapped again when they are read
        return np.asarray(pc.fill_null(places, -1).to_numpy(zero_copy_only=False), np.int32)

    def sizes(self, rows: RowNumbers, column: str) -> RowNumbers:
        """Bytes of the values of a column in some rows; the values are not read."""
        batches = [self._batch(part) for part in range(len(self._paths))]
        bounds = [np.frombuffer(batch.column(column).buffers()[1], np.int64)[: batch.num_rows + 1] for batch in batches]
        return np.concatenate([np.diff(part).astype(np.int32) for part in bounds])[rows]

    def read(self, row: int, column: str) -> memoryview:
        """Bytes of a value in the mapped file.

        Raises:
            IntegrityError: they do not have the CRC-32 that was stored with them.
        """
        part = bisect_right(self._ends, row)
        batch = self._batch(part)
        place = row - self._ends[part - 1] if part else row
        _, bounds, data = batch.column(column).buffers()
        start, end = np.frombuffer(bounds, np.int64)[place : place + 2]
        value = memoryview(data)[start:end]
        key, checks = batch.column("key")[place].as_py(), batch.column("crc32")[place].as_py()
        if zlib.crc32(value, zlib.crc32(key.encode())) != checks[self.columns.index(column)]:
            path = self._paths[part]
            action = f"rm {path}, and run the stage again to encode its rows"
            raise IntegrityError(f"{path}: {column} of {key} is damaged", action)
        return value

    def _open(self, path: Path) -> None:
        """Add a part; a damaged one is renamed to `*.damaged`, so that its items are encoded again."""
        try:
            batch = self._map(path)
        except (pa.ArrowException, OSError, ValueError, IndexError) as error:
            log.warning("feature part %s is damaged (%s); renamed to *.damaged, its items will be encoded again", path, error)
            path.replace(path.with_name(f"{path.name}.damaged"))
            return
        self._batches[len(self._paths)] = batch
        self._paths.append(path)
        self._ends.append((self._ends[-1] if self._ends else 0) + batch.num_rows)

    def _batch(self, part: int) -> pa.RecordBatch:
        if part not in self._batches:
            self._batches[part] = self._map(self._paths[part])
        return self._batches[part]

    def _map(self, path: Path) -> pa.RecordBatch:
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        if batch.schema != self.schema:
            raise pa.ArrowInvalid("it has other columns")
        batch.validate(full=True)  # offsets within the file; values are checked when they are read
        return batch
