"""Normalised media in WebDataset-compatible tar shards with an offset index.

Shards are bucketed by hash prefix, so a new item rewrites one shard. Pictures are stored as PNG or WebP (RGB), sounds
as mono 48 kHz FLAC. Only ingest writes shards; every later stage reads them here and never the raw files.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.atomic import atomic_path
from pipeline_steps.core.contracts import SHARD_INDEX
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.identity import sha256_bytes
from pipeline_steps.core.tables import read_table, write_table

SAMPLE_RATE = 48_000
"""Hz of every stored sound."""

INDEX = "index.parquet"


def write_shards(folder: Path, kind: str, items: Mapping[str, bytes], extension: str, prefix: int = 1) -> list[dict[str, Any]]:
    """Write `items` (id -> encoded payload) as `<kind>-<prefix>.tar` and return their index rows.

    Headers carry no time, owner or order of arrival: the same items give the same bytes.
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
                payload = items[item]
                info = tarfile.TarInfo(f"{item}.{extension}")
                info.size = len(payload)
                info.mode = 0o644
                offset = tar.offset + tarfile.BLOCKSIZE
                tar.addfile(info, io.BytesIO(payload))
                rows.append(
                    {
                        "item_id": item,
                        "kind": kind,
                        "shard": name,
                        "member": info.name,
                        "offset": offset,
                        "size": len(payload),
                        "sha256": sha256_bytes(payload),
                    }
                )
    return rows


def write_index(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the offset index of all shards of `folder`; written last, it marks the shards as complete."""
    write_table(folder / INDEX, SHARD_INDEX, rows)


class MediaReader:
    """Random access to the shards of a media folder through the offset index.

    Raises:
        DataError: the index is missing or an id is not in it.
        IntegrityError: payload bytes do not match the index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        table = read_table(folder / INDEX, SHARD_INDEX)
        self._rows = {row["item_id"]: row for row in table.to_pylist()}

    def __contains__(self, item: str) -> bool:
        return item in self._rows

    def ids(self, kind: str) -> list[str]:
        """Ids of all items of a kind (`image` or `audio`), sorted."""
        return sorted(item for item, row in self._rows.items() if row["kind"] == kind)

    def payload(self, item: str) -> bytes:
        """Encoded bytes of an item, checked against the index."""
        row = self._rows.get(item)
        if row is None:
            raise DataError(f"{item} is not in {self._folder / INDEX}", "run: dvc repro ingest")
        with (self._folder / row["shard"]).open("rb") as handle:
            handle.seek(row["offset"])
            payload: bytes = handle.read(row["size"])
        if sha256_bytes(payload) != row["sha256"]:
            raise IntegrityError(f"{row['shard']}: bytes of {item} do not match the index", "run: dvc repro --force ingest")
        return payload

    def image(self, image_id: str) -> npt.NDArray[np.uint8]:
        """A picture as RGB uint8 [H, W, 3]."""
        from PIL import Image

        with Image.open(io.BytesIO(self.payload(image_id)), formats=("PNG", "WEBP")) as picture:
            return np.asarray(picture.convert("RGB"))

    def sound(self, audio_id: str) -> npt.NDArray[np.float32]:
        """A sound as mono float32 [T] at 48 kHz, in [-1, 1]."""
        import soundfile

        samples, rate = soundfile.read(io.BytesIO(self.payload(audio_id)), dtype="float32")
        if rate != SAMPLE_RATE or samples.ndim != 1:
            raise IntegrityError(f"{audio_id} is stored at {rate} Hz with shape {samples.shape}, expected mono 48 kHz")
        return np.asarray(samples, dtype=np.float32)
