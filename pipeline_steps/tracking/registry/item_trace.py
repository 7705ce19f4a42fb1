"""Where one picture or sound went: catalog, pairs, splits, and the model versions that learned from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.core.config import load_params
from pipeline_steps.core.errors import ConfigError, DataError, StageError
from pipeline_steps.core.hashing import ID_LENGTH, sha256_file
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.safe_paths import display_path
from pipeline_steps.core.schemas import AUDIO, IMAGES, PAIRS, QUARANTINE, TableSchema
from pipeline_steps.core.tables import read_table
from pipeline_steps.tracking.errors import EntryRejectedError
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from pipeline_steps.tracking.lineage.lock_history import DvcCache, iter_lock_history
from pipeline_steps.tracking.registry.model_registry import ModelRegistry, ModelVersionInfo, run_datasets

LEAST_PREFIX = 4


@dataclass(frozen=True, slots=True)
class TracedItem:
    """One picture or sound.

    Attributes:
        kind: `image` or `audio`.
        item_id: hash of its bytes.
        sources: every path below the pool's root that holds these bytes.
        holdout: kept for evaluation; never trained on.
        state: `in the catalog`, `in quarantine`, or `in an older catalog`.
        license, author: as the metadata table says.
    """

    kind: str
    item_id: str
    sources: tuple[str, ...]
    holdout: bool
    state: str
    license: str | None = None
    author: str | None = None


@dataclass(frozen=True, slots=True)
class PairOccurrence:
    """A pair that holds the item: its id, split, and the items on the other side."""

    pair_id: str
    split: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VersionUsage:
    """What a model version had to do with the item. `known` is false when its pair table can no longer be read."""

    version: str
    aliases: tuple[str, ...]
    pairs_md5: str
    known: bool
    occurrences: tuple[PairOccurrence, ...] = ()

    @property
    def splits(self) -> dict[str, int]:
        """Number of pairs by split."""
        counts: dict[str, int] = {}
        for found in self.occurrences:
            counts[found.split] = counts.get(found.split, 0) + 1
        return counts


@dataclass(frozen=True, slots=True)
class ItemTrace:
    """Everything about an item. `versions_problem` says why model versions could not be asked, else empty."""

    item: TracedItem
    pairs: tuple[PairOccurrence, ...]
    versions: tuple[VersionUsage, ...]
    versions_problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "item": asdict(self.item),
            "pairs": [asdict(found) for found in self.pairs],
            "versions": [{**asdict(use), "splits": use.splits} for use in self.versions],
            "versions_problem": self.versions_problem,
        }


def pool_root(layout: ProjectPaths) -> Path:
    """The folder of raw files, as `params.yaml` names it."""
    return layout.root / str(load_params(layout.params).get("ingest", {}).get("root", ""))


def find_items(layout: ProjectPaths, text: str) -> list[TracedItem]:
    """Items with this id (or its beginning), path in the pool, or file on disk; the newest catalog that knows it decides.

    Raises:
        ConfigError: the beginning fits several items.
    """
    wanted = _as_paths(layout, text)
    tables = [(_read(layout.catalog / "images.parquet", IMAGES), _read(layout.catalog / "audio.parquet", AUDIO))]
    found = _among(*tables[0], text, wanted, "in the catalog")
    if not found:
        rows = _read(layout.catalog / "quarantine.parquet", QUARANTINE)
        found = [
            TracedItem(row["kind"], row["item_id"], (row["path"],), False, f"in quarantine: {row['code']}")
            for row in rows
            if row["item_id"] and (_is_prefix(text, row["item_id"]) or row["path"] in wanted or row["item_id"] in wanted)
        ]
    for images, audio in _old_catalogs(layout) if not found else ():
        found = _among(images, audio, text, wanted, "in an older catalog")
        if found:
            break
    ids = sorted({item.item_id for item in found})
    if len(ids) > 1:
        raise ConfigError(f"{text!r} fits {len(ids)} items: {', '.join(ids[:5])}", "give more of the id")
    return found[:1]


def trace_item(layout: ProjectPaths, item: TracedItem) -> ItemTrace:
    """Pairs of the work tree and of every registered model version that hold the item.

    Raises:
        DataError: a pair table is broken.
    """
    current = layout.pairs / "pairs.parquet"
    pairs = occurrences(read_table(current, PAIRS).to_pylist(), item.item_id) if current.is_file() else []
    try:
        registry = ModelRegistry(layout)
        uses = tuple(version_uses(layout, registry, item.item_id))
    except StageError as error:
        return ItemTrace(item, tuple(pairs), (), str(error))
    return ItemTrace(item, tuple(pairs), uses)


def occurrences(rows: Sequence[Mapping[str, Any]], item_id: str) -> list[PairOccurrence]:
    """Rows of a pair table that hold the item as picture or as track, by pair id. Pure."""
    found = []
    for row in rows:
        sounds = [str(track["audio_id"]) for track in row["tracks"]]
        if item_id == row["image_id"]:
            found.append(PairOccurrence(str(row["pair_id"]), str(row["split"]), tuple(sounds)))
        elif item_id in sounds:
            others = (str(row["image_id"]), *(sound for sound in sounds if sound != item_id))
            found.append(PairOccurrence(str(row["pair_id"]), str(row["split"]), others))
    return sorted(found, key=lambda use: use.pair_id)


def version_uses(layout: ProjectPaths, registry: ModelRegistry, item_id: str) -> Iterator[VersionUsage]:
    """Every model version with what its pair table says; tables come from the work tree or DVC's cache, by md5."""
    cache = DvcCache(layout)
    here = hash_path(layout.pairs) if layout.pairs.is_dir() else ""
    tables: dict[str, list[PairOccurrence] | None] = {}
    for info in registry.versions():
        md5 = pairs_md5(registry, info)
        if md5 not in tables:
            path = (
                layout.pairs / "pairs.parquet" if md5 and md5 == here else cache.member(md5, "pairs.parquet") if md5 else None
            )
            rows = read_table(path, PAIRS).to_pylist() if path is not None else None
            tables[md5] = None if rows is None else occurrences(rows, item_id)
        known = tables[md5]
        yield VersionUsage(info.version, info.aliases, md5, known is not None, tuple(known or ()))


def pairs_md5(registry: ModelRegistry, info: ModelVersionInfo) -> str:
    """DVC md5 of the pairs a version was trained on; empty when nobody wrote it down."""
    name = registry.layout.pairs.relative_to(registry.layout.root).as_posix()
    tagged = info.tags.get(f"dvc.md5.{name}", "")
    if tagged or not info.run_id:
        return tagged
    try:
        return run_datasets(registry.call(lambda: registry.client.get_run(info.run_id))).get(name, "")
    except (EntryRejectedError, DataError):
        return ""


def _among(
    images: Sequence[Mapping[str, Any]], audio: Sequence[Mapping[str, Any]], text: str, wanted: set[str], state: str
) -> list[TracedItem]:
    found = []
    for kind, rows in (("image", images), ("audio", audio)):
        for row in rows:
            item_id = str(row[f"{kind}_id"])
            if _is_prefix(text, item_id) or item_id in wanted or wanted & set(row["sources"]):
                sources = tuple(row["sources"])
                found.append(TracedItem(kind, item_id, sources, bool(row["holdout"]), state, row["license"], row["author"]))
    return found


def _is_prefix(text: str, item_id: str) -> bool:
    return len(text) >= LEAST_PREFIX and item_id.startswith(text.lower())


def _as_paths(layout: ProjectPaths, text: str) -> set[str]:
    """What a person may mean by a path: a name in the pool, or a file on disk (then also the id of its bytes)."""
    wanted = {text, display_path(text)}
    try:
        root = pool_root(layout)
    except StageError:
        return wanted
    for path in (Path(text), root / text):
        if path.is_file():
            wanted.add(sha256_file(path)[:ID_LENGTH])
            if path.resolve().is_relative_to(root.resolve()):
                wanted.add(display_path(path.resolve().relative_to(root.resolve()).as_posix()))
    return wanted


def _old_catalogs(layout: ProjectPaths) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Catalogs of earlier commits that are in DVC's cache, newest first."""
    name = layout.catalog.relative_to(layout.root).as_posix()
    seen: dict[str, None] = {}
    for lock in iter_lock_history(layout, name):
        for stage in lock.content["stages"].values():
            seen |= {out["md5"]: None for out in stage.get("outs", ()) if out.get("path") == name and "md5" in out}
    cache = DvcCache(layout)
    for md5 in reversed(list(seen)):
        images, audio = cache.member(md5, "images.parquet"), cache.member(md5, "audio.parquet")
        if images and audio:
            yield _read(images, IMAGES), _read(audio, AUDIO)


def _read(path: Path, contract: TableSchema) -> list[dict[str, Any]]:
    return list(read_table(path, contract).to_pylist()) if path.is_file() else []
