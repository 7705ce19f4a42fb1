"""Bounded FlatBuffers reader for a known schema, without generated code.

Source: https://flatbuffers.dev/internals/. Every malformed input raises AssetFormatError; offsets are checked before each read
and vectors of tables are limited, so that neither time nor memory exceeds a small multiple of the bytes given.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline_steps.assets.readers import AssetFormatError

MOST_TABLES = 10_000
"""Longest vector of tables; entries may share a table, so the file size does not bound the work."""


def _unpack(payload: bytes, code: str, position: int) -> Any:
    """The little-endian number of `struct` code `code` at `position`."""
    if position < 0 or position + struct.calcsize(f"<{code}") > len(payload):
        raise AssetFormatError("FlatBuffers offset reaches beyond the file")
    return struct.unpack_from(f"<{code}", payload, position)[0]


@dataclass(frozen=True, slots=True)
class FlatBufferTable:
    """A table of the buffer. Fields are read by slot (index in the schema, from 0); absent fields have defaults."""

    payload: bytes
    position: int

    def _field(self, slot: int) -> int | None:
        """Position of a field's bytes, None when absent."""
        vtable = self.position - int(_unpack(self.payload, "i", self.position))
        size = int(_unpack(self.payload, "H", vtable))
        entry = 4 + 2 * slot
        if entry + 2 > size:
            return None
        offset = int(_unpack(self.payload, "H", vtable + entry))
        return self.position + offset if offset else None

    def _follow(self, slot: int) -> int | None:
        """Where the offset kept in a field points, None when absent."""
        field = self._field(slot)
        return None if field is None else field + int(_unpack(self.payload, "I", field))

    def integer(self, slot: int, code: str) -> int:
        """An integer field of `struct` code `code`; 0 when absent."""
        field = self._field(slot)
        return 0 if field is None else int(_unpack(self.payload, code, field))

    def table(self, slot: int) -> FlatBufferTable | None:
        """A nested table, None when absent."""
        start = self._follow(slot)
        return None if start is None else FlatBufferTable(self.payload, start)

    def tables(self, slot: int) -> list[FlatBufferTable]:
        """A vector of tables, empty when absent."""
        start = self._follow(slot)
        if start is None:
            return []
        count = int(_unpack(self.payload, "I", start))
        if count > MOST_TABLES:
            raise AssetFormatError(f"{count} tables in one FlatBuffers vector, at most {MOST_TABLES}")
        entries = range(start + 4, start + 4 + 4 * count, 4)
        return [FlatBufferTable(self.payload, entry + int(_unpack(self.payload, "I", entry))) for entry in entries]

    def numbers(self, slot: int, dtype: str) -> npt.NDArray[Any]:
        """A vector of numbers of a numpy dtype, read-only and without a copy; empty when absent."""
        start = self._follow(slot)
        if start is None:
            return np.empty(0, dtype)
        count = int(_unpack(self.payload, "I", start))
        if start + 4 + count * np.dtype(dtype).itemsize > len(self.payload):
            raise AssetFormatError("FlatBuffers vector reaches beyond the file")
        return np.frombuffer(self.payload, dtype, count, start + 4)


def root(payload: bytes, identifier: bytes) -> FlatBufferTable:
    """The outermost table of a buffer whose file identifier is the one expected."""
    if payload[4:8] != identifier:
        raise AssetFormatError(f"not a FlatBuffers file of kind {identifier!r}")
    return FlatBufferTable(payload, int(_unpack(payload, "I", 0)))
