"""The checks behind `sonify verify`; each hashes bytes again and compares them with what was recorded when they were made."""

from __future__ import annotations

import configparser
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import StageError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.lineage.dvc_digests import directory_listing, listing_digest, md5_file, read_lock


@dataclass(frozen=True, slots=True)
class IntegrityCheck:
    """What was hashed, how many files, and the first thing that differs (empty when all is as recorded)."""

    what: str
    files: int
    problem: str = ""
    cure: str = ""
    note: str = ""


def check_all(layout: ProjectPaths) -> list[IntegrityCheck]:
    """Outs and cache of `dvc.lock`, media shards, search index, weights: whatever of them is there.

    Raises:
        ConfigError: `dvc.lock` is broken.
    """
    checks = list(_outs(layout))
    for check in (_shards, _index, _weights):
        try:
            checks += check(layout)
        except StageError as error:
            checks.append(IntegrityCheck(check.__name__.strip("_"), 0, error.reason, error.action))
    return checks


def _outs(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    stages = read_lock(layout.root / "dvc.lock").get("stages", {})
    cache = cache_folder(layout)
    for stage, entry in stages.items():
        for out in entry.get("outs", []):
            yield check_out(layout.root / out["path"], out, stage)
            yield from check_cache(cache, out, stage)


def check_out(path: Path, out: dict[str, Any], stage: str) -> IntegrityCheck:
    """An out on disk against the md5 in `dvc.lock`; for a folder, the files that differ are named when the cache knows them."""
    what = str(out["path"])
    cure = f"dvc checkout {what} (the recorded bytes), or dvc repro --force {stage} (make it again)"
    if not path.exists():
        return IntegrityCheck(what, 0, "is missing", cure)
    if not str(out["md5"]).endswith(".dir"):
        found = "" if path.is_dir() else md5_file(path)
        return IntegrityCheck(
            what, 1, "" if found == out["md5"] else f"md5 is {found or 'that of a folder'}, dvc.lock says {out['md5']}", cure
        )
    rows = directory_listing(path) if path.is_dir() else []
    found = listing_digest(rows)
    if found == out["md5"]:
        return IntegrityCheck(what, len(rows))
    return IntegrityCheck(what, len(rows), f"the folder's md5 is {found}, dvc.lock says {out['md5']}", cure)


def check_cache(cache: Path, out: dict[str, Any], stage: str) -> Iterator[IntegrityCheck]:
    """The cache objects of an out: each is named by the md5 of its bytes. An object that is not there is only noted."""
    md5 = str(out["md5"])
    path = object_path(cache, md5)
    if not path.is_file():
        return
    what = f"cache of {out['path']}"
    cure = f"rm the object named, then dvc commit {stage} if the out is intact, else dvc repro --force {stage}"
    if md5_file(path) != md5.removesuffix(".dir"):
        yield IntegrityCheck(what, 1, f"{path} holds other bytes than its name says", cure)
        return
    if not md5.endswith(".dir"):
        yield IntegrityCheck(what, 1)
        return
    count, missing = 1, 0
    for row in json.loads(path.read_text(encoding="utf-8")):
        member = object_path(cache, row["md5"])
        if not member.is_file():
            missing += 1
            continue
        count += 1
        if md5_file(member) != row["md5"]:
            yield IntegrityCheck(what, count, f"{member} ({row['relpath']}) holds other bytes than its name says", cure)
            return
    yield IntegrityCheck(what, count, note=f"{missing} objects are not in the cache" if missing else "")


def cache_folder(layout: ProjectPaths) -> Path:
    """DVC's local cache: `cache.dir` of the configuration files, else `.dvc/cache`."""
    folder = layout.root / ".dvc"
    chosen = folder / "cache"
    for name in ("config", "config.local"):
        parser = configparser.ConfigParser()
        parser.read(folder / name, encoding="utf-8")
        if parser.has_option("cache", "dir"):
            chosen = folder / parser.get("cache", "dir")
    return chosen


def object_path(cache: Path, md5: str) -> Path:
    """Where DVC 3 keeps the object of an md5 (with `.dir` for a folder's listing)."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def _shards(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    """Every payload against `index.parquet`, and every member of every shard against the list of members."""
    from pipeline_steps.core.media_shards import INDEX, MediaShardReader
    from pipeline_steps.core.schemas import SHARD_INDEX
    from pipeline_steps.core.tables import read_table

    if not (layout.media / INDEX).is_file():
        return
    cure = "dvc checkout data/media, or dvc repro --force ingest"
    rows = read_table(layout.media / INDEX, SHARD_INDEX).to_pylist()
    reader = MediaShardReader(layout.media)
    for row in rows:
        try:
            reader.payload(row["item_id"])
        except (StageError, OSError) as error:
            yield IntegrityCheck("data/media", len(rows), str(getattr(error, "reason", error)), cure)
            return
    indexed = {(row["shard"], row["member"]) for row in rows}
    present: set[tuple[str, str]] = set()
    for shard in sorted(layout.media.glob("*.tar")):
        try:
            with tarfile.open(shard) as tar:
                names = [(shard.name, member.name) for member in tar]
        except tarfile.TarError as error:
            yield IntegrityCheck("data/media", len(rows), f"{shard.name} is no tar file: {error}", cure)
            return
        if len(names) != len(set(names)):
            yield IntegrityCheck("data/media", len(rows), f"{shard.name} holds a member twice", cure)
            return
        present |= set(names)
    if odd := sorted(present ^ indexed):
        where = "not in index.parquet" if odd[0] in present else "not in its shard"
        yield IntegrityCheck("data/media", len(rows), f"{odd[0][0]}: member {odd[0][1]} is {where}", cure)
        return
    yield IntegrityCheck("data/media against its index", len(rows))


def _index(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    """The Annoy file against its side-car, and both against the embeddings they were built from."""
    if not (layout.retrieval / "index.json").is_file():
        return
    from pipeline_steps.retrieve.index.annoy import IndexMetadata
    from pipeline_steps.retrieve.stage import read_vectors

    path = layout.retrieval / "index.ann"
    side_car = IndexMetadata.from_json((layout.retrieval / "index.json").read_text(encoding="utf-8"))
    cure = "dvc checkout data/retrieval, or dvc repro --force retrieve"
    found = sha256_file(path) if path.is_file() else "missing"
    problem = "" if found == side_car.sha256 else f"sha256 of index.ann is {found}, its side-car says {side_car.sha256}"
    yield IntegrityCheck("data/retrieval/index.ann against its side-car", 1, problem, cure if problem else "")
    if (layout.embeddings / "meta.json").is_file():
        meta = read_vectors(layout)[0]
        yield IntegrityCheck("data/embeddings against meta.json", len(meta["sha256"]))


def _weights(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    path = layout.assets / "meta.json"
    if not path.is_file():
        return
    files = json.loads(path.read_text(encoding="utf-8"))["files"]
    for name, entry in sorted(files.items()):
        file = layout.assets / name
        found = sha256_file(file) if file.is_file() else "missing"
        if found != entry["sha256"]:
            yield IntegrityCheck(
                f"data/assets/{name}", 1, f"sha256 is {found}, meta.json says {entry['sha256']}", "dvc repro --force assets"
            )
            return
    yield IntegrityCheck("data/assets against meta.json", len(files))
