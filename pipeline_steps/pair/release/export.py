"""Export of the pairs as a publishable data set, as WebDataset or as Parquet. Runs on demand, not in the stage."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline_steps import __version__
from pipeline_steps.core.atomic import atomic_path, write_bytes, write_json, write_text
from pipeline_steps.core.checksums import read_verified
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.core.media_shards import MediaShardReader, add_member
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, IMAGES, PAIRS, RELEASE_INDEX
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.pair.release.dataset_card import croissant, render_card
from pipeline_steps.pair.release.hub_card import dataset_head
from pipeline_steps.pair.release.license_terms import terms
from pipeline_steps.pair.release.parquet_rows import audio_columns, release_row, release_schema
from pipeline_steps.pair.release.selection import (
    ReleaseSelection,
    credits_csv,
    left_out_csv,
    sample_json,
    select,
    track_members,
)
from pipeline_steps.pair.splits import SPLITS

Row = Mapping[str, Any]
Progress = Callable[[Sequence[Row]], Iterable[Row]]


MAX_PARQUET_BYTES = 500_000_000
"""Media in one Parquet file."""

ROWS_PER_GROUP = 100
"""Rows of a row group: the hub's viewer reads whole row groups."""

PRIVATE_NOTICE = """
> **Private.** This set was written with `--private`: every pair, whatever its license. It may contain works whose license is
> unknown or forbids sharing a changed copy. Do not publish it.
"""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Result of an export: pairs by split, excluded pairs by code, data files, licenses whose text is missing, privacy."""

    pairs: dict[str, int]
    left_out: dict[str, int]
    shards: list[str]
    licenses_without_text: list[str]
    private: bool = False


@dataclass(frozen=True, slots=True)
class _Catalog:
    """Catalog rows by id, and the media."""

    images: Mapping[str, Row]
    audio: Mapping[str, Row]
    media: MediaShardReader

    @classmethod
    def open(cls, layout: ProjectPaths) -> _Catalog:
        images = {row["image_id"]: row for row in read_table(layout.catalog / "images.parquet", IMAGES).to_pylist()}
        audio = {row["audio_id"]: row for row in read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()}
        return cls(images, audio, MediaShardReader(layout.media))

    def parquet_row(self, pair: Row) -> dict[str, Any]:
        """Row of a pair with its media."""
        flacs = [self.media.payload(track["audio_id"]) for track in pair["tracks"]]
        return release_row(pair, self.images[pair["image_id"]], self.audio, _png(self.media.payload(pair["image_id"])), flacs)


def export_webdataset(
    layout: ProjectPaths,
    folder: Path,
    licenses: Collection[str] | None = None,
    license_texts: Path | None = None,
    pairs_per_shard: int = 1000,
    private: bool = False,
    progress: Progress = iter,
) -> ExportResult:
    """Write the pairs as tar shards (`<split>-<number>.tar`; `.png`, `.flac` and `.json` per pair) with documentation.

    Beside the shards: `index.parquet` (sha256 of every member), `pairs.parquet`, `README.md`, `croissant.json`, `LICENSES.csv`
    (attribution of each work), `LICENSES/<id>.txt`, `left_out.csv`. Pairs with a work whose license is unknown or forbids
    sharing changed copies are excluded, counted and listed. The same inputs give the same bytes.

    Args:
        licenses: SPDX ids that are included; None for every license that allows sharing.
        license_texts: folder with `<id>.txt`; default: that of the demo data.
        private: include every pair, whatever its license, and mark the card as private.
        progress: wraps the pairs that are written.

    Raises:
        ConfigError: the folder is not empty, or a license in `licenses` does not allow sharing.
        DataError: no pair is left.
        IntegrityError: a payload does not match its hash.
    """
    selection, catalog = _select(layout, folder, licenses, private), _Catalog.open(layout)
    rows: list[dict[str, Any]] = []
    shards: dict[str, list[str]] = {}
    for split, own in _by_split(selection.pairs).items():
        for number, start in enumerate(range(0, len(own), pairs_per_shard)):
            name = f"{split}-{number:06d}.tar"
            shard = own[start : start + pairs_per_shard]
            rows += _write_shard(folder / name, split, progress(shard), catalog.media, catalog.images, catalog.audio)
            shards.setdefault(split, []).append(name)
    write_table(folder / "index.parquet", RELEASE_INDEX, rows)
    return _describe(layout, folder, selection, catalog, shards, private, license_texts, "webdataset", ["index.parquet"])


def export_parquet(
    layout: ProjectPaths,
    folder: Path,
    licenses: Collection[str] | None = None,
    license_texts: Path | None = None,
    private: bool = False,
    progress: Progress = iter,
) -> ExportResult:
    """Write the pairs as Parquet with embedded images and audio, which `datasets.load_dataset` and the hub's viewer read.

    Files are `data/<split>-<number>-of-<count>.parquet`. The documentation beside them, the exclusion of pairs, arguments and
    errors are those of `export_webdataset`.
    """
    selection, catalog = _select(layout, folder, licenses, private), _Catalog.open(layout)
    schema = release_schema(audio_columns(selection.pairs))
    files: dict[str, list[str]] = {}
    for split, own in _by_split(selection.pairs).items():
        parts = _write_parquet(folder / "data", split, progress(own), catalog, schema)
        names = [f"data/{split}-{number:05d}-of-{len(parts):05d}.parquet" for number in range(len(parts))]
        for part, name in zip(parts, names, strict=True):
            part.rename(folder / name)
        files.update({split: names} if names else {})
    return _describe(layout, folder, selection, catalog, files, private, license_texts, "datasets", [])


def pair_table(layout: ProjectPaths, pairs: Sequence[Row]) -> pa.Table:
    """Rows of pairs with their media, as `export_parquet` writes them. All media are in memory."""
    catalog = _Catalog.open(layout)
    rows = [catalog.parquet_row(pair) for pair in pairs]
    return pa.Table.from_pylist(rows, schema=release_schema(audio_columns(pairs)))


def _select(layout: ProjectPaths, folder: Path, licenses: Collection[str] | None, private: bool) -> ReleaseSelection:
    """Pairs to write; creates the folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder", "choose a new folder")
    if private and licenses:
        raise ConfigError("a private export takes no list of licenses: it includes every pair", "leave one of the two out")
    closed = sorted(name for name in licenses or () if not terms(name).publishable)
    if closed:
        raise ConfigError(
            f"license {closed[0]!r} does not allow sharing or is unknown", "name SPDX ids such as CC0-1.0, CC-BY-4.0, MIT"
        )
    table = read_table(layout.pairs / "pairs.parquet", PAIRS)
    selection = ReleaseSelection(table.to_pylist(), []) if private else select(table.to_pylist(), licenses)
    if not selection.pairs:
        raise DataError(
            f"no pair may be shared: excluded {selection.counts()}",
            "see the license column of the metadata table; for your own use: --private",
        )
    folder.mkdir(parents=True, exist_ok=True)
    return selection


def _by_split(pairs: Sequence[Row]) -> dict[str, list[Row]]:
    own: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for pair in sorted(pairs, key=lambda pair: str(pair["pair_id"])):
        own[pair["split"]].append(pair)
    return own


def _write_parquet(folder: Path, split: str, pairs: Iterable[Row], catalog: _Catalog, schema: pa.Schema) -> list[Path]:
    """Write the pairs of a split and return the files, which have temporary names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    writer: pq.ParquetWriter | None = None
    rows: list[dict[str, Any]] = []
    size = 0
    for pair in pairs:
        if writer is None:
            paths.append(folder / f".{split}-{len(paths):05d}.tmp")
            writer = pq.ParquetWriter(
                paths[-1], schema, write_page_index=True, write_page_checksum=True, use_content_defined_chunking=True
            )
        row = catalog.parquet_row(pair)
        rows.append(row)
        size += sum(len(value["bytes"]) for value in row.values() if isinstance(value, dict) and "bytes" in value)
        if len(rows) == ROWS_PER_GROUP or size > MAX_PARQUET_BYTES:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows = []
        if size > MAX_PARQUET_BYTES:
            writer.close()
            writer, size = None, 0
    if writer is not None:
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        writer.close()
    return paths


def _write_shard(
    target: Path, split: str, pairs: Iterable[Row], media: MediaShardReader, images: Mapping[str, Row], audio: Mapping[str, Row]
) -> list[dict[str, Any]]:
    """Write one tar and return its index rows. Members of a sample are adjacent."""
    rows: list[dict[str, Any]] = []
    with atomic_path(target) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            for extension, payload in _members(pair, media, images, audio):
                row = {"pair_id": pair["pair_id"], "split": split, "shard": target.name}
                rows.append(row | add_member(tar, f"{pair['pair_id']}.{extension}", payload))
    return rows


def _members(
    pair: Row, media: MediaShardReader, images: Mapping[str, Row], audio: Mapping[str, Row]
) -> Iterator[tuple[str, bytes]]:
    yield "png", _png(media.payload(pair["image_id"]))
    for track, extension in zip(pair["tracks"], track_members(pair), strict=True):
        yield extension, media.payload(track["audio_id"])
    sample = sample_json(pair, images[pair["image_id"]], audio)
    yield "json", json.dumps(sample, sort_keys=True, ensure_ascii=False).encode("utf-8")


def _png(payload: bytes) -> bytes:
    """Stored image as PNG; a WebP image is encoded again."""
    if payload.startswith(b"\x89PNG\r\n\x1a\n"):
        return payload
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(payload), formats=("WEBP",)) as image:
        image.convert("RGB").save(buffer, "PNG", optimize=False)
    return buffer.getvalue()


def _copy_texts(folder: Path, pairs: Sequence[Row], texts: Path) -> list[str]:
    """Copy the text of every license used; return the identifiers without a text."""
    used = sorted({str(pair[key]) for pair in pairs for key in ("image_license", "audio_license") if pair[key]})
    missing: list[str] = []
    for name in used:
        # A license string comes from the metadata table: only an identifier may become a file name.
        safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,80}", name) is not None
        source = texts / f"{name}.txt"
        if safe and source.is_file() and not source.is_symlink():
            write_bytes(folder / "LICENSES" / source.name, source.read_bytes())
        else:
            missing.append(name)
    return missing


def _describe(
    layout: ProjectPaths,
    folder: Path,
    selection: ReleaseSelection,
    catalog: _Catalog,
    shards: Mapping[str, Sequence[str]],
    private: bool,
    license_texts: Path | None,
    library: str,
    others: Sequence[str],
) -> ExportResult:
    """Write the tables and cards beside the data files `shards` (by split) of a set for `library`, and return the result.

    Args:
        others: further files of the set that the Croissant description lists.
    """
    pairs, left_out = selection.pairs, selection.counts()
    write_table(folder / "pairs.parquet", PAIRS, [dict(pair) for pair in pairs])
    write_text(folder / "LICENSES.csv", credits_csv(pairs, catalog.images, catalog.audio))
    write_text(folder / "left_out.csv", left_out_csv(selection))
    missing = _copy_texts(folder, pairs, license_texts or layout.root / "data/demo/LICENSES")
    title = f"Seeing Sound pairs, {'private' if private else 'published'} set"
    counts = Counter(str(pair["split"]) for pair in pairs)
    licenses = [pair[key] for pair in pairs for key in ("image_license", "audio_license")]
    extension = "tar" if library == "webdataset" else "parquet"
    prefix = "" if library == "webdataset" else "data/"
    head = dataset_head(
        title,
        licenses,
        {split: f"{prefix}{split}-*.{extension}" for split in shards},
        counts,
        {split: sum((folder / name).stat().st_size for name in names) for split, names in shards.items()},
        ["seeing-sound", library],
        private,
    )
    stats = json.loads(read_verified(layout.pairs / "stats.json"))
    parameters: dict[str, Any] = {"pairs left out for their license": sum(left_out.values()), **left_out}
    card = render_card(pairs, stats, parameters, title)
    if private:
        heading, _, rest = card.partition("\n")
        card = f"{heading}\n{PRIVATE_NOTICE}{rest}"
    write_text(folder / "README.md", head + card)
    names = [name for of_split in shards.values() for name in of_split]
    kinds = {"pairs.parquet": "application/x-parquet", "LICENSES.csv": "text/csv"}
    kinds.update(dict.fromkeys(others, "application/x-parquet"))
    kinds.update(dict.fromkeys(names, "application/x-tar" if library == "webdataset" else "application/x-parquet"))
    files = [{"name": name, "format": kind, "sha256": sha256_file(folder / name)} for name, kind in sorted(kinds.items())]
    form = "WebDataset" if library == "webdataset" else "Parquet"
    description = f"{len(pairs)} images, each paired automatically with a clip of an unrelated collection, as {form}."
    write_json(folder / "croissant.json", croissant(pairs, files, "seeing_sound_pairs", description, __version__))
    return ExportResult({split: counts.get(split, 0) for split in SPLITS}, left_out, names, missing, private)
