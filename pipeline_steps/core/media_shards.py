"""Normalised media in WebDataset-compatible tar shards with an offset index.

Shards are bucketed by hash prefix, so a new item rewrites one shard. Images are stored as PNG or WebP (RGB), audio
as mono 48 kHz FLAC. Only ingest writes shards; later stages read them and never the raw files.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from pipeline_steps.core.atomic import atomic_path
from pipeline_steps.core.checksums import damaged
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.core.schemas import SHARD_INDEX
from pipeline_steps.core.tables import read_table, write_table

SAMPLE_RATE = 48_000
"""Hz of all stored audio."""

INDEX = "index.parquet"

OPEN_SHARDS = 128
"""Shards that a reader keeps open."""


def add_member(tar: tarfile.TarFile, name: str, payload: bytes) -> dict[str, Any]:
    """Append a member without time and owner to an archive, and return its columns of the offset index."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(payload), 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(payload))
    return {"member": name, "offset": offset, "size": len(payload), "sha256": sha256_bytes(payload)}


def write_shards(folder: Path, kind: str, items: Mapping[str, bytes], extension: str, prefix: int = 1) -> list[dict[str, Any]]:
    """Write `items` (id -> encoded payload) as `<kind>-<prefix>.tar` and return their index rows.

    The same items give the same bytes, in whatever order they are given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buckets: dict[str, list[str]] = {}
    for item in sorted(items):
        buckets.setdefault(item[:prefix], []).append(item)
    rows: list[dict[str, Any]] = []
    for bucket, members in sorted(buckets.items()):
        name = f"{kind}-{bucket}.tar"
        with atomic_path(folder / name) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for item in members:
                row = {"item_id": item, "kind": kind, "shard": name}
                rows.append(row | add_member(tar, f"{item}.{extension}", items[item]))
    return rows


def write_index(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the offset index of all shards of `folder`; written last, its presence means that the shards are complete."""
    write_table(folder / INDEX, SHARD_INDEX, rows)


class MediaShardReader:
    """Random access to the shards of a media folder through the offset index: one positioned read per item, no tar header.

    Args:
        folder: the shards and their index.
        verify: compare each item with its hash the first time this reader reads it. Without it,
            `sonify verify` checks the whole folder.

    Raises:
        DataError: the index is missing or an id is not in it.
        IntegrityError: payload bytes do not match the index.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self._folder = folder
        table = read_table(folder / INDEX, SHARD_INDEX)
        shards = table["shard"].combine_chunks().dictionary_encode()
        self._shards: list[str] = shards.dictionary.to_pylist()
        self._shard: npt.NDArray[np.int32] = shards.indices.to_numpy(zero_copy_only=False)
        self._offset: npt.NDArray[np.int64] = table["offset"].to_numpy()
        self._size: npt.NDArray[np.int64] = table["size"].to_numpy()
        self._kind = table["kind"].combine_chunks()
        self._sha256 = table["sha256"].combine_chunks()
        self._row = {item: row for row, item in enumerate(table["item_id"].to_pylist())}
        self._unchecked = np.full(len(self._row), verify)
        self._open: dict[str, int] = {}

    def __contains__(self, item: str) -> bool:
        return item in self._row

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process opens the shards itself

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def ids(self, kind: str) -> list[str]:
        """Ids of all items of a kind (`image` or `audio`), sorted."""
        rows = np.flatnonzero(pc.equal(self._kind, kind).to_numpy(zero_copy_only=False))
        names = list(self._row)
        return sorted(names[row] for row in rows.tolist())

    def payload(self, item: str) -> bytes:
        """Encoded bytes of an item, checked against the index."""
        row = self._row.get(item)
        if row is None:
            raise DataError(f"{item} is not in {self._folder / INDEX}", "run: dvc repro ingest")
        name, size = self._shards[self._shard[row]], int(self._size[row])
        payload = self._read(name, int(self._offset[row]), size)
        if self._unchecked[row] or len(payload) != size:
            if sha256_bytes(payload) != self._sha256[row].as_py():
                raise damaged(self._folder / name, f"bytes of {item} do not match the index")
            self._unchecked[row] = False
        return payload

    def _read(self, shard: str, offset: int, size: int) -> bytes:
        """Bytes of a shard; the first shards stay open, others are opened for each read. Threads may share a reader."""
        descriptor = self._open.get(shard)
        if descriptor is None:
            descriptor = os.open(self._folder / shard, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) >= OPEN_SHARDS or self._open.setdefault(shard, descriptor) != descriptor:
                try:
                    return os.pread(descriptor, size, offset)
                finally:
                    os.close(descriptor)
        return os.pread(descriptor, size, offset)

    def image(self, image_id: str) -> npt.NDArray[np.uint8]:
        """An image as RGB uint8 [H, W, 3]."""
        from PIL import Image

        with Image.open(io.BytesIO(self.payload(image_id)), formats=("PNG", "WEBP")) as image:
            return np.asarray(image.convert("RGB"))

    def sound(self, audio_id: str) -> npt.NDArray[np.float32]:
        """A clip as mono float32 [T] at 48 kHz, in [-1, 1]."""
        import soundfile

        samples, rate = soundfile.read(io.BytesIO(self.payload(audio_id)), dtype="float32")
        if rate != SAMPLE_RATE or samples.ndim != 1:
            raise IntegrityError(f"{audio_id} is stored at {rate} Hz with shape {samples.shape}, expected mono 48 kHz")
        return np.asarray(samples, dtype=np.float32)
