"""Trace of one image or audio clip: catalog, pairs, splits, and the model versions trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.core.config import load_params
from pipeline_steps.core.errors import ConfigError, StageError
from pipeline_steps.core.hashing import ID_LENGTH, sha256_file
from pipeline_steps.core.pool_check import pool_roots
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.safe_paths import display_path
from pipeline_steps.core.schemas import AUDIO, IMAGES, PAIRS, QUARANTINE, TableSchema
from pipeline_steps.core.tables import read_table
from pipeline_steps.tracking.client.mlflow_client import run_datasets
from pipeline_steps.tracking.lineage.dvc_digests import hash_path, lock_outs, relative
from pipeline_steps.tracking.lineage.lock_history import DvcCache, iter_lock_history
from pipeline_steps.tracking.registry.model_registry import ModelRegistry, ModelVersionInfo

MIN_PREFIX = 4


@dataclass(frozen=True, slots=True)
class TracedItem:
    """One image or audio clip."""

    kind: str  # `image` or `audio`
    item_id: str  # hash of its bytes
    sources: tuple[str, ...]  # paths of all files with these bytes, relative to the pool
    holdout: bool  # held out for evaluation; never trained on
    state: str  # `in the catalog`, `in quarantine: CODE`, or `in an older catalog`
    license: str | None = None  # license in the metadata table
    author: str | None = None  # author in the metadata table


@dataclass(frozen=True, slots=True)
class PairOccurrence:
    """A pair that contains the item: id, split, and the other items of the pair."""

    pair_id: str
    split: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VersionUsage:
    """Pairs with the item in the training data of a model version."""

    version: str  # model version
    aliases: tuple[str, ...]  # aliases of the version
    pairs_md5: str  # DVC md5 of its pairs; empty if it was not logged
    pairs_available: bool  # whether its pair table can still be read
    occurrences: tuple[PairOccurrence, ...] = ()  # pairs that contain the item

    @property
    def splits(self) -> dict[str, int]:
        """Number of pairs by split."""
        return dict(Counter(found.split for found in self.occurrences))


@dataclass(frozen=True, slots=True)
class ItemTrace:
    """Trace of an item. `versions_problem` is why model versions could not be read, else empty."""

    item: TracedItem
    pairs: tuple[PairOccurrence, ...]
    versions: tuple[VersionUsage, ...]
    versions_problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        return {
            "item": asdict(self.item),
            "pairs": [asdict(found) for found in self.pairs],
            "versions": [{**asdict(use), "splits": use.splits} for use in self.versions],
            "versions_problem": self.versions_problem,
        }


def pool_folders(layout: ProjectPaths) -> dict[str, Path]:
    """Folders of raw files of `params.yaml` by the prefix of their paths in the tables: "" or "name/"."""
    roots = pool_roots(load_params(layout.params))
    return {f"{name}/" if name else "": layout.root / root for name, root in roots.items()}


def find_item(layout: ProjectPaths, text: str) -> TracedItem | None:
    """Find the item with an id (or prefix), path in the pool, or file on disk; None if there is none.

    The catalog is searched first, then the quarantine, then older catalogs, newest first.

    Raises:
        ConfigError: the prefix matches several items.
    """
    names = _possible_names(layout, text)
    images, audio = _read(layout.catalog / "images.parquet", IMAGES), _read(layout.catalog / "audio.parquet", AUDIO)
    found = _matching_items(images, audio, text, names, "in the catalog")
    if not found:
        rows = _read(layout.catalog / "quarantine.parquet", QUARANTINE)
        found = [
            TracedItem(row["kind"], row["item_id"], (row["path"],), False, f"in quarantine: {row['code']}")
            for row in rows
            if row["item_id"] and (_is_prefix(text, row["item_id"]) or row["path"] in names or row["item_id"] in names)
        ]
    for images, audio in _old_catalogs(layout) if not found else ():
        found = _matching_items(images, audio, text, names, "in an older catalog")
        if found:
            break
    ids = sorted({item.item_id for item in found})
    if len(ids) > 1:
        raise ConfigError(f"{text!r} matches {len(ids)} items: {', '.join(ids[:5])}", "give more characters of the id")
    return found[0] if found else None


def trace_item(layout: ProjectPaths, item: TracedItem) -> ItemTrace:
    """Find the item in the pairs of the work tree and of every registered model version.

    Raises:
        DataError: a pair table cannot be read.
    """
    current = layout.pairs / "pairs.parquet"
    pairs = occurrences(read_table(current, PAIRS).to_pylist(), item.item_id) if current.is_file() else []
    try:
        return ItemTrace(item, tuple(pairs), tuple(version_uses(layout, ModelRegistry(layout), item.item_id)))
    except StageError as error:
        return ItemTrace(item, tuple(pairs), (), str(error))


def occurrences(rows: Sequence[Mapping[str, Any]], item_id: str) -> list[PairOccurrence]:
    """Pairs of a pair table that contain the item as image or as track, sorted by pair id. Pure."""
    found = []
    for row in rows:
        members = [str(row["image_id"]), *(str(track["audio_id"]) for track in row["tracks"])]
        if item_id in members:
            others = tuple(member for member in members if member != item_id)
            found.append(PairOccurrence(str(row["pair_id"]), str(row["split"]), others))
    return sorted(found, key=lambda use: use.pair_id)


def version_uses(layout: ProjectPaths, registry: ModelRegistry, item_id: str) -> Iterator[VersionUsage]:
    """Yield the usage of the item by every model version. Pair tables are read from the work tree or DVC's cache by md5."""
    cache = DvcCache(layout)
    here = hash_path(layout.pairs) if layout.pairs.is_dir() else ""
    tables: dict[str, list[PairOccurrence] | None] = {}
    for info in registry.versions():
        md5 = pairs_md5(registry, info)
        if md5 not in tables:
            path = None
            if md5:
                path = layout.pairs / "pairs.parquet" if md5 == here else cache.member(md5, "pairs.parquet")
            tables[md5] = occurrences(read_table(path, PAIRS).to_pylist(), item_id) if path is not None else None
        found = tables[md5]
        yield VersionUsage(info.version, info.aliases, md5, found is not None, tuple(found or ()))


def pairs_md5(registry: ModelRegistry, info: ModelVersionInfo) -> str:
    """DVC md5 of the pairs that a version was trained on; empty if it was not logged."""
    name = relative(registry.layout, registry.layout.pairs)
    return registry.all_tags(info).get(f"dvc.md5.{name}") or run_datasets(registry.run(info.run_id)).get(name, "")


def _matching_items(
    images: Sequence[Mapping[str, Any]], audio: Sequence[Mapping[str, Any]], text: str, names: set[str], state: str
) -> list[TracedItem]:
    found = []
    for kind, rows in (("image", images), ("audio", audio)):
        for row in rows:
            item_id = str(row[f"{kind}_id"])
            if _is_prefix(text, item_id) or item_id in names or names & set(row["sources"]):
                sources = tuple(row["sources"])
                found.append(TracedItem(kind, item_id, sources, bool(row["holdout"]), state, row["license"], row["author"]))
    return found


def _is_prefix(text: str, item_id: str) -> bool:
    return len(text) >= MIN_PREFIX and item_id.startswith(text.lower())


def _possible_names(layout: ProjectPaths, text: str) -> set[str]:
    """Paths in the pool that `text` may denote; for a file on disk also the id of its bytes."""
    names = {text, display_path(text)}
    try:
        folders = pool_folders(layout)
    except StageError:
        return names
    for prefix, root in folders.items():
        for path in (Path(text), root / text.removeprefix(prefix)):
            if path.is_file():
                names.add(sha256_file(path)[:ID_LENGTH])
                if path.resolve().is_relative_to(root.resolve()):
                    names.add(prefix + display_path(path.resolve().relative_to(root.resolve()).as_posix()))
    return names


def _old_catalogs(layout: ProjectPaths) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield the image and audio tables of earlier catalogs in DVC's cache, newest first."""
    name = relative(layout, layout.catalog)
    digests = [lock_outs(lock.content).get(name) for lock in iter_lock_history(layout, name)]
    cache = DvcCache(layout)
    for md5 in reversed(list(dict.fromkeys(filter(None, digests)))):
        images, audio = cache.member(md5, "images.parquet"), cache.member(md5, "audio.parquet")
        if images and audio:
            yield _read(images, IMAGES), _read(audio, AUDIO)


def _read(path: Path, contract: TableSchema) -> list[dict[str, Any]]:
    return list(read_table(path, contract).to_pylist()) if path.is_file() else []
