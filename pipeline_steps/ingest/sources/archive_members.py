"""Media inside one file: members of a tar, cells of an Arrow or Parquet column. Runs in decoding processes."""

from __future__ import annotations

import io
import mmap
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from pipeline_steps.core.safe_paths import BLOCK, file_size
from pipeline_steps.ingest.candidates import ArchiveMember
from pipeline_steps.ingest.reason_codes import RejectedItemError

MAX_SIDECAR_BYTES = 1_000_000
"""JSON, text and class members above this size are ignored."""

CACHED_ROW_GROUPS = 2
"""Parquet row groups kept by a process. Items of one group are decoded one after the other."""

_row_groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()


class MemberPayload(NamedTuple):
    """Archive member with its bytes."""

    member: ArchiveMember
    payload: bytes


class TableRecord(NamedTuple):
    """Row of a table: its number, its metadata columns, and the payload of each media column (None without bytes)."""

    number: int
    values: dict[str, Any]
    payloads: dict[str, MemberPayload | None]


def open_member(handle: BinaryIO, member: ArchiveMember, archive: str) -> BinaryIO:
    """Bytes of a member as an open file; `archive` is the name of the open archive `handle`.

    Raises:
        RejectedItemError: FILE_CHANGED when the location does not exist any more.
    """
    if member.group < 0:
        if member.offset + member.size > file_size(handle):
            raise RejectedItemError("FILE_CHANGED", "the archive is shorter than when it was listed; run again")
        handle.seek(member.offset)
        return io.BytesIO(handle.read(member.size))
    key = (archive, member.group, member.column)
    if key not in _row_groups:
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(handle, page_checksum_verification=True)
            _row_groups[key] = file.read_row_group(member.group, columns=[member.column])
        except (ValueError, OSError) as error:  # pyarrow.ArrowInvalid is a ValueError
            raise RejectedItemError("FILE_CHANGED", f"row group {member.group} cannot be read: {error}") from error
        if len(_row_groups) > CACHED_ROW_GROUPS:
            _row_groups.popitem(last=False)
    return io.BytesIO(_cell_bytes(_row_groups[key].column(0)[member.row].as_py())[0] or b"")


def tar_members(handle: BinaryIO) -> Iterator[tuple[str, MemberPayload | RejectedItemError]]:
    """(name, payload or rejection) of every regular member of an uncompressed tar. Nothing is unpacked to disk.

    A tar without its end marker (a block of zeros, followed by zeros only) is rejected after its last readable member. A
    writer that omits the marker cannot be distinguished from a file that was cut at a member boundary.

    Raises:
        RejectedItemError: ARCHIVE_CORRUPT when the file is no tar, truncated or damaged.
    """
    size = file_size(handle)
    names: set[str] = set()
    try:
        with tarfile.TarFile(fileobj=handle) as archive:
            for info in archive:
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    kind = "a link" if info.issym() or info.islnk() else "no regular file"
                    yield info.name, RejectedItemError("NOT_A_FILE", f"the member is {kind}; it was not opened")
                elif info.offset_data + info.size > size:
                    yield info.name, RejectedItemError("ARCHIVE_CORRUPT", "the archive ends before this member does")
                    return
                elif info.name in names:
                    yield info.name, RejectedItemError("ARCHIVE_DUPLICATE", "the archive contains this name before")
                else:
                    names.add(info.name)
                    position = handle.tell()
                    handle.seek(info.offset_data)
                    payload = handle.read(info.size)
                    handle.seek(position)
                    yield info.name, MemberPayload(ArchiveMember(info.name, info.offset_data, info.size), payload)
            _check_end(handle, archive.offset)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise RejectedItemError("ARCHIVE_CORRUPT", f"not a complete tar file: {error}") from error


def _check_end(handle: BinaryIO, offset: int) -> None:
    """Raise ARCHIVE_CORRUPT unless the end marker is at `offset`: `tarfile` stops silently at an unreadable header."""
    handle.seek(offset)
    block = handle.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise RejectedItemError("ARCHIVE_CORRUPT", f"the tar ends at byte {offset} without its end marker; it may be truncated")
    if any(block):
        raise RejectedItemError("ARCHIVE_CORRUPT", f"the header at byte {offset} is damaged; the rest was not read")
    while block := handle.read(BLOCK):
        if block.count(0) != len(block):
            raise RejectedItemError(
                "ARCHIVE_CORRUPT", f"the tar continues after its end marker at byte {offset}; the rest was not read"
            )


MEDIA_COLUMNS = frozenset(
    ("image", "images", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "audio", "audio_bytes", "sound", "flac",
     "wav", "mp3", "ogg", "opus", "content", "data")
)  # fmt: skip
"""Names of binary columns that are read as media. Columns of {bytes, path} are media under any name."""


def _media_columns(schema: Any) -> list[str]:
    """Columns of an Arrow schema that contain encoded images or audio.

    Raises:
        RejectedItemError: ARCHIVE_NO_MEDIA when there is none.
    """
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    names = []
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind):
            media = kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type)
        else:
            media = is_binary(kind) and field.name.lower() in MEDIA_COLUMNS
        if media:
            names.append(field.name)
    if not names:
        raise RejectedItemError("ARCHIVE_NO_MEDIA", f"no column of images or audio; it has {', '.join(schema.names)[:200]}")
    return names


def parquet_records(handle: BinaryIO, metadata: frozenset[str]) -> Iterator[TableRecord]:
    """Rows of a Parquet file; of the columns without media only those named in `metadata` are read.

    Raises:
        RejectedItemError: ARCHIVE_CORRUPT for an unreadable file, ARCHIVE_NO_MEDIA without a column of media.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(handle, page_checksum_verification=True)
        media = _media_columns(file.schema_arrow)
        names = [*media, *(name for name in file.schema_arrow.names if name.lower() in metadata and name not in media)]
        number = 0
        for group in range(file.num_row_groups):
            for row, values in enumerate(file.read_row_group(group, columns=names).to_pylist()):
                payloads: dict[str, MemberPayload | None] = {}
                for name in media:
                    payload, path = _cell_bytes(values.pop(name))
                    member = ArchiveMember(path, 0, len(payload or b""), name, group, row)
                    payloads[name] = None if payload is None else MemberPayload(member, payload)
                yield TableRecord(number, values, payloads)
                number += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise RejectedItemError("ARCHIVE_CORRUPT", f"not a readable Parquet file: {error}") from error


def _cell_bytes(value: Any) -> tuple[bytes | None, str]:
    """Bytes and path of a cell in a media column."""
    if isinstance(value, dict):
        return value.get("bytes"), str(value.get("path") or "")
    return value, ""


def arrow_records(handle: BinaryIO, metadata: frozenset[str]) -> Iterator[TableRecord]:
    """Rows of an uncompressed Arrow file (stream or file format), as `datasets` saves them. Members are byte ranges.

    Raises:
        RejectedItemError: ARCHIVE_CORRUPT for an unreadable or compressed file, ARCHIVE_NO_MEDIA as for Parquet.
    """
    import pyarrow as pa

    try:
        buffer = pa.py_buffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        reader: Any = pa.ipc.open_file(buffer) if bytes(buffer[:6]) == b"ARROW1" else pa.ipc.open_stream(buffer)
        media = _media_columns(reader.schema)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader
        number = 0
        for batch in batches:
            names = [name for name in batch.schema.names if name.lower() in metadata and name not in media]
            rows = batch.select(names).to_pylist() if names else [{} for _ in range(batch.num_rows)]
            columns = {name: _column_payloads(batch.column(name), name, buffer) for name in media}
            for row, values in enumerate(rows):
                yield TableRecord(number, values, {name: payloads[row] for name, payloads in columns.items()})
                number += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
        raise RejectedItemError("ARCHIVE_CORRUPT", f"not a readable Arrow file: {error}") from error


def _column_payloads(column: Any, name: str, buffer: Any) -> list[MemberPayload | None]:
    """Cells of a record batch's column as byte ranges of the mapped file. Arrow stores a column's bytes contiguously."""
    import numpy as np
    import pyarrow as pa

    struct = pa.types.is_struct(column.type)
    values = column.field("bytes") if struct else column
    paths = column.field("path").to_pylist() if struct and column.type.get_field_index("path") >= 0 else [None] * len(column)
    _, ends, data = values.buffers()
    width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    offsets = np.frombuffer(ends, width)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    # A batch without media bytes has no location in the file: Arrow gives it an empty buffer of its own.
    empty = data is None or not len(values) or offsets.min() == offsets.max()
    start = 0 if empty else data.address - buffer.address
    if not empty and not 0 <= start + int(offsets.min()) <= start + int(offsets.max()) <= buffer.size:
        raise RejectedItemError("ARCHIVE_CORRUPT", "the Arrow file is compressed; save it without compression")
    payloads: list[MemberPayload | None] = []
    for row, valid in enumerate(zip(column.is_valid().to_pylist(), values.is_valid().to_pylist(), strict=True)):
        first, size = start + int(offsets[row]), int(offsets[row + 1] - offsets[row])
        member = ArchiveMember(str(paths[row] or ""), first, size, name)
        payloads.append(MemberPayload(member, buffer.slice(first, size).to_pybytes()) if all(valid) and size >= 0 else None)
    return payloads
