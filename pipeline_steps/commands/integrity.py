"""Checks of `sonify verify`: hash bytes again and compare them with the recorded hashes."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.commands.console import progress_bar
from pipeline_steps.core.checksums import NAME, read_checksums, verified_sha256
from pipeline_steps.core.errors import StageError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.lineage.dvc_digests import directory_listing, listing_digest, md5_file, read_lock, relative
from pipeline_steps.tracking.lineage.lock_history import DvcCache


@dataclass(frozen=True, slots=True)
class IntegrityCheck:
    """Result for one group of files: what was hashed, number of files, first difference (empty if intact) and its fix."""

    what: str
    files: int
    problem: str = ""
    fix: str = ""
    note: str = ""


def check_all(layout: ProjectPaths) -> list[IntegrityCheck]:
    """Check outs and cache of `dvc.lock`, media shards, search index, embeddings and weights, as far as they exist.

    Raises:
        ConfigError: `dvc.lock` is damaged.
    """
    cache = DvcCache(layout)
    checks: list[IntegrityCheck] = []
    stages = read_lock(layout.lock).get("stages", {})
    outs = [(stage, out) for stage, entry in stages.items() for out in entry.get("outs", [])]
    for stage, out in progress_bar(outs, "hashing outs"):
        checks += [check_out(layout.root / out["path"], out, stage), *check_cache(cache, out, stage)]
    for check in (_recorded, _shards, _index, _embeddings, _weights):
        try:
            checks += check(layout)
        except StageError as error:
            checks.append(IntegrityCheck(f"data/{check.__name__.strip('_')}", 0, error.reason, error.action))
    return checks


def check_out(path: Path, out: dict[str, Any], stage: str) -> IntegrityCheck:
    """Compare an out on disk with its md5 in `dvc.lock`."""
    what, expected = str(out["path"]), str(out["md5"])
    fix = f"dvc checkout {what} (restores the recorded bytes), or dvc repro --force {stage} (creates it again)"
    if not path.exists():
        return IntegrityCheck(what, 0, "is missing", fix)
    rows = directory_listing(path) if path.is_dir() else []
    found = listing_digest(rows) if path.is_dir() else md5_file(path)
    problem = "" if found == expected else f"md5 is {found}, dvc.lock has {expected}"
    return _result(what, len(rows) if path.is_dir() else 1, problem, fix)


def check_cache(cache: DvcCache, out: dict[str, Any], stage: str) -> Iterator[IntegrityCheck]:
    """Compare the cache objects of an out with the md5 in their names. A missing object is only noted."""
    md5 = str(out["md5"])
    if cache.path(md5) is None:
        return
    what = f"cache of {out['path']}"
    fix = f"rm the named object, then dvc commit {stage} if the out is intact, else dvc repro --force {stage}"
    count = missing = 0
    objects = [(md5, "")]
    for expected, name in objects:
        path = cache.path(expected)
        if path is None:
            missing += 1
            continue
        count += 1
        if md5_file(path) != expected.removesuffix(".dir"):
            yield IntegrityCheck(what, count, f"{path}{name} has another md5 than its name", fix)
            return
        if expected.endswith(".dir"):
            objects += [(member, f" ({relpath})") for relpath, member in (cache.listing(expected) or {}).items()]
    yield IntegrityCheck(what, count, note=f"{missing} objects are not in the cache" if missing else "")


def _recorded(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    """Compare the outs with the checksums that their stages recorded."""
    for out in (
        *(layout.assets, layout.catalog, layout.media, layout.captions),
        *(layout.embeddings, layout.retrieval, layout.pairs, layout.model),
    ):
        if (out / NAME).is_file():
            what = f"checksums of {relative(layout, out)}"
            try:
                files = read_checksums(out)[1]
                for name in files:
                    verified_sha256(out / name)
                yield IntegrityCheck(what, len(files))
            except (StageError, OSError) as error:
                action = getattr(error, "action", f"dvc checkout {relative(layout, out)}")
                yield IntegrityCheck(what, 0, getattr(error, "reason", str(error)), action)


def _shards(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    """Compare payloads with `index.parquet`, and the members of all shards with the list in it."""
    from pipeline_steps.core.media_shards import INDEX
    from pipeline_steps.core.schemas import SHARD_INDEX
    from pipeline_steps.core.tables import read_table

    if not (layout.media / INDEX).is_file():
        return
    rows = read_table(layout.media / INDEX, SHARD_INDEX).to_pylist()
    try:
        problem = _shard_problem(layout.media, rows)
    except (StageError, OSError, tarfile.TarError) as error:
        problem = str(getattr(error, "reason", error))
    yield _result("data/media", len(rows), problem, "dvc checkout data/media, or dvc repro --force ingest")


def _shard_problem(folder: Path, rows: list[dict[str, Any]]) -> str:
    from pipeline_steps.core.media_shards import MediaShardReader

    reader = MediaShardReader(folder)
    for row in rows:
        reader.payload(row["item_id"])
    indexed = {(row["shard"], row["member"]) for row in rows}
    present: set[tuple[str, str]] = set()
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            names = [(shard.name, member.name) for member in tar]
        if len(names) != len(set(names)):
            return f"{shard.name} has a member twice"
        present |= set(names)
    if different := sorted(present ^ indexed):
        shard_name, member = different[0]
        return f"{shard_name}: member {member} is not in {'index.parquet' if different[0] in present else 'its shard'}"
    return ""


def _index(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    """Compare the Annoy file with its metadata file."""
    from pipeline_steps.retrieve.index.annoy import IndexMetadata

    metadata = layout.retrieval / "index.json"
    if metadata.is_file():
        expected = IndexMetadata.from_json(metadata.read_text(encoding="utf-8")).sha256
        yield _hash_check(layout.retrieval / "index.ann", "data/retrieval/index.ann", expected, "index.json", "retrieve")


def _embeddings(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    from pipeline_steps.retrieve.stage import read_vectors

    if (layout.embeddings / "meta.json").is_file():
        yield IntegrityCheck("data/embeddings", len(read_vectors(layout)[0]["sha256"]))


def _weights(layout: ProjectPaths) -> Iterator[IntegrityCheck]:
    metadata = layout.assets / "meta.json"
    files = json.loads(metadata.read_text(encoding="utf-8"))["files"] if metadata.is_file() else {}
    for name, entry in sorted(files.items()):
        yield _hash_check(layout.assets / name, f"data/assets/{name}", entry["sha256"], "meta.json", "assets")


def _hash_check(path: Path, what: str, expected: str, record: str, stage: str) -> IntegrityCheck:
    found = sha256_file(path) if path.is_file() else "missing"
    problem = "" if found == expected else f"sha256 is {found}, {record} has {expected}"
    return _result(what, 1, problem, f"dvc repro --force {stage}")


def _result(what: str, files: int, problem: str, fix: str) -> IntegrityCheck:
    return IntegrityCheck(what, files, problem, fix if problem else "")
