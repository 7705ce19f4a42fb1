"""Media inside one file: members of a tar, values of an Arrow or Parquet column. Listed and taken out in decoding processes."""

from __future__ import annotations

import io
import mmap
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from pipeline_steps.core.safe_paths import BLOCK, file_size
from pipeline_steps.ingest.catalog import ArchiveMember
from pipeline_steps.ingest.reason_codes import RejectedItemError

SIDE_CAR = 1_000_000
"""Bytes of a JSON, text or class member that are read at most."""

CACHED_GROUPS = 2
"""Row groups of Parquet kept by a decoding process: items of one group come one after the other."""

_groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()


class MemberPayload(NamedTuple):
    """A member with its bytes, as a listing sees it."""

    member: ArchiveMember
    payload: bytes


def open_member(handle: BinaryIO, member: ArchiveMember, archive: str) -> BinaryIO:
    """The bytes of a member as an open file.

    Args:
        handle: the open archive.
        member: from a listing.
        archive: sha256 or name of the archive, key of the cache of row groups.

    Raises:
        RejectedError: FILE_CHANGED when the place is not there any more.
    """
    if member.group < 0:
        if member.offset + member.size > file_size(handle):
            raise RejectedItemError("FILE_CHANGED", "the archive is shorter than when it was listed; run again")
        handle.seek(member.offset)
        return io.BytesIO(handle.read(member.size))
    key = (archive, member.group, member.column)
    if key not in _groups:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            _groups[key] = pq.ParquetFile(handle).read_row_group(member.group, columns=[member.column])
        except (pa.ArrowInvalid, OSError) as error:
            raise RejectedItemError("FILE_CHANGED", f"row group {member.group} cannot be read: {error}") from error
        while len(_groups) > CACHED_GROUPS:
            _groups.popitem(last=False)
    value = _groups[key].column(0)[member.row].as_py()
    payload = value.get("bytes") if isinstance(value, dict) else value
    return io.BytesIO(payload or b"")


def tar_members(handle: BinaryIO) -> Iterator[tuple[str, MemberPayload | RejectedItemError]]:
    """(name, part or reason) of every plain member of an uncompressed tar. Nothing is unpacked to disk.

    A tar without its end marker (a block of zeros, and zeros alone after it) is refused after its last readable member, even
    if it ends on a member boundary: one whose writer left the marker out looks like one that was cut there.

    Raises:
        RejectedError: ARCHIVE_CORRUPT for what is no tar, or one that is cut or damaged.
    """
    size = file_size(handle)
    seen: set[str] = set()
    try:
        with tarfile.TarFile(fileobj=handle) as archive:
            for info in archive:
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    kind = "a link" if info.issym() or info.islnk() else "no plain file"
                    yield info.name, RejectedItemError("NOT_A_FILE", f"the member is {kind}; it was not opened")
                elif info.offset_data + info.size > size:
                    yield info.name, RejectedItemError("ARCHIVE_CORRUPT", "the archive ends before this member does")
                    return
                elif info.name in seen:
                    yield info.name, RejectedItemError("ARCHIVE_DUPLICATE", "the archive holds this name before")
                else:
                    seen.add(info.name)
                    here = handle.tell()
                    handle.seek(info.offset_data)
                    payload = handle.read(info.size)
                    handle.seek(here)
                    yield info.name, MemberPayload(ArchiveMember(info.name, info.offset_data, info.size), payload)
            _check_end(handle, archive.offset)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise RejectedItemError("ARCHIVE_CORRUPT", f"not a whole tar file: {error}") from error


def _check_end(handle: BinaryIO, offset: int) -> None:
    """`tarfile` stops without a word at a header that it cannot read: refuse what stands at `offset` unless it is the end."""
    handle.seek(offset)
    block = handle.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise RejectedItemError("ARCHIVE_CORRUPT", f"the tar ends at byte {offset} without its end marker; it may be cut there")
    if any(block):
        raise RejectedItemError("ARCHIVE_CORRUPT", f"the header at byte {offset} is damaged; what follows was not read")
    while block := handle.read(BLOCK):
        if block.count(0) != len(block):
            raise RejectedItemError(
                "ARCHIVE_CORRUPT", f"the tar goes on after its end marker at byte {offset}; that was not read"
            )


MEDIA_COLUMNS = frozenset(
    ("image", "images", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "audio", "audio_bytes", "sound", "flac",
     "wav", "mp3", "ogg", "opus", "content", "data")
)  # fmt: skip
"""Names under which a plain binary column is taken for media. Columns of {bytes, path} are, whatever their name."""


def media_columns(schema: Any) -> list[str]:
    """Columns of an Arrow schema that hold encoded pictures or sounds."""
    import pyarrow as pa

    found = []
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            inner = kind.field("bytes").type
            if pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
                found.append(field.name)
        elif (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and field.name.lower() in MEDIA_COLUMNS:
            found.append(field.name)
    return found


class TableRecord(NamedTuple):
    """One row of a table: its number, its other columns, and per media column the part, or None where no bytes are embedded."""

    number: int
    values: dict[str, Any]
    parts: dict[str, MemberPayload | None]


def parquet_records(handle: BinaryIO, others: frozenset[str]) -> Iterator[TableRecord]:
    """Rows of a Parquet file; of the columns that are no media only `others` are read.

    Raises:
        RejectedError: ARCHIVE_CORRUPT for an unreadable file, ARCHIVE_NO_MEDIA for one without a column of media.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(handle)
        media = _media_or_refuse(file.schema_arrow)
        names = [*media, *(name for name in file.schema_arrow.names if name.lower() in others and name not in media)]
        number = 0
        for group in range(file.num_row_groups):
            for row, values in enumerate(file.read_row_group(group, columns=names).to_pylist()):
                parts: dict[str, MemberPayload | None] = {}
                for name in media:
                    payload, inner = _bytes_of(values.pop(name))
                    member = ArchiveMember(inner, 0, len(payload or b""), name, group, row)
                    parts[name] = None if payload is None else MemberPayload(member, payload)
                yield TableRecord(number, values, parts)
                number += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise RejectedItemError("ARCHIVE_CORRUPT", f"not a readable Parquet file: {error}") from error


def arrow_records(handle: BinaryIO, others: frozenset[str]) -> Iterator[TableRecord]:
    """Rows of an uncompressed Arrow file (stream or file format), as `datasets` saves them; parts are places in the file.

    Raises:
        RejectedError: ARCHIVE_CORRUPT for an unreadable or compressed file, ARCHIVE_NO_MEDIA as for Parquet.
    """
    import pyarrow as pa

    try:
        whole = pa.py_buffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        reader: Any = pa.ipc.open_file(whole) if bytes(whole[:6]) == b"ARROW1" else pa.ipc.open_stream(whole)
        media = _media_or_refuse(reader.schema)
        batches = (
            (reader.get_batch(index) for index in range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader
        )
        number = 0
        for batch in batches:
            kept = [name for name in batch.schema.names if name.lower() in others and name not in media]
            rows = batch.select(kept).to_pylist() if kept else [{} for _ in range(batch.num_rows)]
            columns = {name: _parts(batch.column(name), name, whole) for name in media}
            for row, values in enumerate(rows):
                yield TableRecord(number, values, {name: parts[row] for name, parts in columns.items()})
                number += 1
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
        raise RejectedItemError("ARCHIVE_CORRUPT", f"not a readable Arrow file: {error}") from error


def _media_or_refuse(schema: Any) -> list[str]:
    media = media_columns(schema)
    if not media:
        raise RejectedItemError("ARCHIVE_NO_MEDIA", f"no column of pictures or sounds; it has {', '.join(schema.names)[:200]}")
    return media


def _bytes_of(value: Any) -> tuple[bytes | None, str]:
    if isinstance(value, dict):
        return value.get("bytes"), str(value.get("path") or "")
    return value, ""


def _parts(column: Any, name: str, whole: Any) -> list[MemberPayload | None]:
    """Each value of a batch's column as a place in the mapped file: Arrow keeps the bytes of a column end to end."""
    import numpy as np
    import pyarrow as pa

    struct = pa.types.is_struct(column.type)
    values = column.field("bytes") if struct else column
    paths = column.field("path").to_pylist() if struct and column.type.get_field_index("path") >= 0 else [None] * len(column)
    _, ends, data = values.buffers()
    width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    offsets = np.frombuffer(ends, width)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    # A batch without a byte of media has no place in the file for them: Arrow gives it an empty buffer of its own.
    empty = data is None or not len(values) or offsets.min() == offsets.max()
    start = 0 if empty else data.address - whole.address
    if not empty and not 0 <= start + int(offsets.min()) <= start + int(offsets.max()) <= whole.size:
        raise RejectedItemError("ARCHIVE_CORRUPT", "the Arrow file is compressed; save it without compression")
    there = [bool(a and b) for a, b in zip(column.is_valid().to_pylist(), values.is_valid().to_pylist(), strict=True)]
    parts: list[MemberPayload | None] = []
    for row, valid in enumerate(there):
        first, size = start + int(offsets[row]), int(offsets[row + 1] - offsets[row])
        member = ArchiveMember(str(paths[row] or ""), first, size, name)
        parts.append(MemberPayload(member, whole.slice(first, size).to_pybytes()) if valid and size >= 0 else None)
    return parts
