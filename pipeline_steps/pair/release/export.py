"""Export of the pairs as a publishable WebDataset (`sonify export --webdataset DIR`). Runs on demand, not in the stage."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from pipeline_steps.pair.release.license_terms import terms
from pipeline_steps.pair.release.selection import credits_csv, left_out_csv, sample_json, select, track_members
from pipeline_steps.pair.splits import SPLITS

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Result of an export: pairs by split, excluded pairs by code, shard names, licenses whose text is missing."""

    pairs: dict[str, int]
    left_out: dict[str, int]
    shards: list[str]
    licenses_without_text: list[str]


def export_webdataset(
    layout: ProjectPaths,
    folder: Path,
    licenses: Collection[str] | None = None,
    license_texts: Path | None = None,
    pairs_per_shard: int = 1000,
) -> ExportResult:
    """Write the pairs as tar shards (`<split>-<number>.tar`; `.png`, `.flac` and `.json` per pair) with documentation.

    Beside the shards: `index.parquet` (sha256 of every member), `pairs.parquet`, `README.md`, `croissant.json`, `LICENSES.csv`
    (attribution of each work), `LICENSES/<id>.txt`, `left_out.csv`. Pairs with a work whose license is unknown or forbids
    sharing changed copies are excluded, counted and listed. The same inputs give the same bytes.

    Args:
        licenses: SPDX ids that are included; None for every license that allows sharing.
        license_texts: folder with `<id>.txt`; default: that of the demo data.

    Raises:
        ConfigError: the folder is not empty, or a license in `licenses` does not allow sharing.
        DataError: no pair is left.
        IntegrityError: a payload does not match its hash.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder", "choose a new folder")
    closed = sorted(name for name in licenses or () if not terms(name).publishable)
    if closed:
        raise ConfigError(
            f"license {closed[0]!r} does not allow sharing or is unknown", "name SPDX ids such as CC0-1.0, CC-BY-4.0, MIT"
        )
    table = read_table(layout.pairs / "pairs.parquet", PAIRS)
    selection = select(table.to_pylist(), licenses)
    if not selection.pairs:
        raise DataError(f"no pair may be shared: excluded {selection.counts()}", "see the license column of the metadata table")
    images = {row["image_id"]: row for row in read_table(layout.catalog / "images.parquet", IMAGES).to_pylist()}
    audio = {row["audio_id"]: row for row in read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()}
    stats = json.loads(read_verified(layout.pairs / "stats.json"))
    folder.mkdir(parents=True, exist_ok=True)
    media = MediaShardReader(layout.media)
    rows: list[dict[str, Any]] = []
    shards: list[str] = []
    for split in SPLITS:
        own = sorted((pair for pair in selection.pairs if pair["split"] == split), key=lambda pair: str(pair["pair_id"]))
        for number, start in enumerate(range(0, len(own), pairs_per_shard)):
            name = f"{split}-{number:06d}.tar"
            rows += _write_shard(folder / name, split, own[start : start + pairs_per_shard], media, images, audio)
            shards.append(name)
    write_table(folder / "index.parquet", RELEASE_INDEX, rows)
    write_table(folder / "pairs.parquet", PAIRS, [dict(pair) for pair in selection.pairs])
    write_text(folder / "LICENSES.csv", credits_csv(selection.pairs, images, audio))
    write_text(folder / "left_out.csv", left_out_csv(selection))
    missing = _copy_texts(folder, selection.pairs, license_texts or layout.root / "data/demo/LICENSES")
    _describe(folder, selection.pairs, stats, selection.counts(), shards)
    counts = Counter(str(pair["split"]) for pair in selection.pairs)
    return ExportResult({split: counts.get(split, 0) for split in SPLITS}, selection.counts(), shards, missing)


def _write_shard(
    target: Path, split: str, pairs: Sequence[Row], media: MediaShardReader, images: Mapping[str, Row], audio: Mapping[str, Row]
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
    used = sorted({str(pair[key]) for pair in pairs for key in ("image_license", "audio_license")})
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
    folder: Path, pairs: Sequence[Row], stats: Mapping[str, Any], left_out: Mapping[str, int], shards: Sequence[str]
) -> None:
    parameters: dict[str, Any] = {"pairs left out for their license": sum(left_out.values()), **left_out}
    card = render_card(pairs, stats, parameters, "Seeing Sound pairs, published set")
    write_text(folder / "README.md", card)
    kinds = {"pairs.parquet": "application/x-parquet", "index.parquet": "application/x-parquet", "LICENSES.csv": "text/csv"}
    kinds.update(dict.fromkeys(shards, "application/x-tar"))
    files = [{"name": name, "format": kind, "sha256": sha256_file(folder / name)} for name, kind in sorted(kinds.items())]
    description = f"{len(pairs)} images, each paired automatically with a clip of an unrelated collection, as WebDataset."
    write_json(folder / "croissant.json", croissant(pairs, files, "seeing_sound_pairs", description, __version__))
