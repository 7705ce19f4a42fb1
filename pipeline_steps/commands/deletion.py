"""Deletion of an image or audio clip for `sonify forget`: search for its copies, and their removal."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from pipeline_steps.core.atomic import write_bytes
from pipeline_steps.core.checksums import record_checksums
from pipeline_steps.core.config import load_params
from pipeline_steps.core.errors import StageError
from pipeline_steps.core.git import try_git
from pipeline_steps.core.hashing import ID_LENGTH, sha256_bytes, sha256_file
from pipeline_steps.core.media_shards import INDEX, MediaShardReader, write_index, write_shards
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import SHARD_INDEX
from pipeline_steps.core.tables import PARQUET, read_table
from pipeline_steps.ingest import takedowns
from pipeline_steps.tracking.lineage.dvc_digests import relative
from pipeline_steps.tracking.lineage.lock_history import DvcCache, iter_lock_history
from pipeline_steps.tracking.registry.item_trace import ItemTrace, TracedItem, pool_folders


@dataclass
class DeletionPlan:
    """Files and rows that the removal of an item affects."""

    files: list[Path] = field(default_factory=list)  # raw files with these bytes
    tables: dict[str, int] = field(default_factory=dict)  # CSV table -> number of rows that name one of the item's paths
    # parts of the result cache with results of the item, or of mixtures that may contain it
    cache_parts: list[Path] = field(default_factory=list)
    shard: str | None = None  # media shard with the item, else None
    reports: list[Path] = field(default_factory=list)  # files of the reports and of `.runs` named after it
    rebuild: list[str] = field(default_factory=list)  # what becomes stale, with the command that rebuilds it
    beyond: list[str] = field(default_factory=list)  # copies that cannot be removed from here, with the required action

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [f"raw file       {path}" for path in self.files]
        lines += [f"table          {rows} rows of {path}" for path, rows in self.tables.items()]
        lines += [f"result cache   {len(self.cache_parts)} parts"] if self.cache_parts else []
        lines += [f"media shard    {self.shard}"] if self.shard else []
        lines += [f"reports, runs  {len(self.reports)} files"] if self.reports else []
        lines += ["", "to be rebuilt:", *(f"  {text}" for text in self.rebuild)]
        return [*lines, "", "not reached from here:", *(f"  {text}" for text in self.beyond)]


def plan_deletion(layout: ProjectPaths, item: TracedItem, trace: ItemTrace) -> DeletionPlan:
    """Find all copies of the item; changes nothing."""
    folders = pool_folders(layout)
    files = {path: None for root in folders.values() for path in raw_files(root, item)}  # pools may overlap
    plan = DeletionPlan(files=list(files), cache_parts=cache_parts(layout, item.item_id))
    names = pool_names(folders, item, plan.files)
    plan.tables, unread = tables_with(layout, item, plan.files)
    index = layout.media / INDEX
    rows = read_table(index, SHARD_INDEX).to_pylist() if index.is_file() else []
    plan.shard = next((str(row["shard"]) for row in rows if row["item_id"] == item.item_id), None)
    named = [path for folder in (layout.reports, layout.runs) for path in sorted(folder.rglob(f"*{item.item_id}*"))]
    plan.reports = [path for path in named if path.is_file()]
    plan.rebuild = ["ingest and all stages after it: dvc repro"]
    if {use.split for use in trace.pairs} & {"train", "val"}:
        plan.rebuild.append("the model, because it learned from the item: dvc repro train (part of the above)")
    archives = sorted({name for name in item.sources if not _is_present(folders, name)})
    if archives and not plan.files:
        plan.beyond.append(f"bytes inside archives, tables or removed files of the pool: {', '.join(archives)}; rewrite them")
    plan.beyond += [f"{path}: only CSV tables are rewritten here; remove its rows by hand" for path in unread]
    plan.beyond += [*model_traces(item, trace), *stored_copies(layout, item, names)]
    return plan


def raw_files(root: Path, item: TracedItem) -> list[Path]:
    """Every file below the pool's root with the item's bytes, whatever its name and whether or not a table lists it."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink())
    return [path for path in files if sha256_file(path)[:ID_LENGTH] == item.item_id]


def pool_names(folders: Mapping[str, Path], item: TracedItem, files: list[Path]) -> set[str]:
    """Paths of the item in the tables of the stages: those of the catalog and those of its files."""
    found = {
        prefix + path.relative_to(root).as_posix()
        for prefix, root in folders.items()
        for path in files
        if path.is_relative_to(root)
    }
    return {*item.sources, *found}


def _is_present(folders: Mapping[str, Path], name: str) -> bool:
    """Whether a path of the catalog is a file of its pool, and not a member of an archive."""
    return any((root / name.removeprefix(prefix)).exists() for prefix, root in folders.items() if name.startswith(prefix))


def tables_with(layout: ProjectPaths, item: TracedItem, files: list[Path]) -> tuple[dict[str, int], list[Path]]:
    """CSV tables of the parameters with the number of rows that name the item; and tables of other formats."""
    tables = _tables(layout, item, files)
    texts = {path: path.read_bytes().decode("utf-8") for path in tables if path.suffix.lower() == ".csv"}
    found = {str(path): drop_csv_rows(text, *tables[path])[1] for path, text in texts.items()}
    return {path: rows for path, rows in found.items() if rows}, [path for path in tables if path not in texts]


def _tables(layout: ProjectPaths, item: TracedItem, files: list[Path]) -> dict[Path, tuple[str, set[str]]]:
    """Tables of the parameters -> column of file names, and names of the item in that column.

    A metadata table names files relative to the root of its pool, the ground truth as the catalog does.
    """
    params, folders = load_params(layout.params), pool_folders(layout)
    names = pool_names(folders, item, files)
    found: dict[Path, tuple[str, set[str]]] = {}
    for prefix, root in folders.items():
        pool = params["ingest"]["pools"][prefix[:-1]] if prefix else params["ingest"]
        table = root / str(pool.get("metadata") or "")
        if table.is_file():
            column = str((pool.get("columns") or {}).get("file", "file"))
            own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
            # Two pools may share a table.
            found[table.resolve()] = (column, found.get(table.resolve(), ("", set()))[1] | own)
    truth = layout.root / str((params.get("evaluate") or {}).get("ground_truth") or "")
    if truth.is_file() and truth.resolve() not in found:
        found[truth.resolve()] = ("file", names)
    return found


def drop_csv_rows(text: str, column: str, names: set[str]) -> tuple[str, int]:
    """Drop CSV rows whose `column` is one of `names`, keep all other bytes; returns text and number of dropped rows."""
    lines = io.StringIO(text, newline="").readlines()
    reader = csv.reader(lines)
    header = [name.lstrip("\ufeff") for name in next(reader, [])]
    if column not in header:
        return text, 0
    place, start, kept, dropped = header.index(column), reader.line_num, lines[: reader.line_num], 0
    for row in reader:
        record = lines[start : reader.line_num]
        start = reader.line_num
        if len(row) > place and row[place] in names:
            dropped += 1
        else:
            kept += record
    return "".join(kept), dropped


def cache_parts(layout: ProjectPaths, item_id: str) -> list[Path]:
    """Cache parts with rows of the item, and all of stage train, whose keys do not name items."""
    found = []
    for path in sorted(path for path in layout.result_cache.rglob("*") if path.is_file()):
        keys = part_keys(path)
        if keys is None or any(may_derive_from(stage_of(layout, path), key, item_id) for key in keys):
            found.append(path)
    return found


def part_keys(path: Path) -> list[str] | None:
    """Keys of a cache part; None if its items are unknown: it is damaged, or has features of mixtures."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read(columns=["key"])
    except (OSError, ValueError):
        return None
    return [str(key) for key in table["key"].to_pylist()]


def stage_of(layout: ProjectPaths, part: Path) -> str:
    """Stage to which a cache part belongs: the first folder below the cache."""
    return part.relative_to(layout.result_cache).parts[0]


def may_derive_from(stage: str, key: str, item_id: str) -> bool:
    """Whether a result may derive from the item. Keys of mixtures are hashes without item ids, so these always may."""
    mixture = stage == "train" or (stage == "evaluate-sound" and len(key) != len(item_id))
    return mixture or item_id in key


def model_traces(item: TracedItem, trace: ItemTrace) -> list[str]:
    """Model versions that used the item, and their artifacts in MLflow."""
    learned = [use.version for use in trace.versions if use.splits.keys() & {"train", "val"}]
    tested = [use.version for use in trace.versions if "test" in use.splits or item.holdout]
    unknown = [use.version for use in trace.versions if not use.pairs_available]
    lines = [f"MLflow is unreachable: {trace.versions_problem}"] if trace.versions_problem else []
    for versions, text in (
        (unknown, ": their pairs are not in DVC's cache, so their use of it is unknown"),
        (tested, " were evaluated with it: artifacts of their evaluation runs may show it"),
        (learned, " learned from it: train without it, promote, then delete them in MLflow"),
    ):
        lines[:0] = [f"model versions {', '.join(versions)}{text}"] if versions else []
    return lines


def stored_copies(layout: ProjectPaths, item: TracedItem, names: set[str]) -> list[str]:
    """Copies in DVC's cache, its remotes, git's history, and outside the project."""
    lines, folders = [], pool_folders(layout)
    media = relative(layout, layout.media)
    outs = {
        str(out["md5"])
        for lock in iter_lock_history(layout)
        for stage in lock.content["stages"].values()
        for out in stage.get("outs", ())
        if out.get("path") == media and "md5" in out
    }
    try:
        cache = DvcCache(layout)
        objects = {md5 for out in outs for shard, md5 in (cache.listing(out) or {}).items() if _may_hold(shard, item)}
    except StageError:  # not a DVC project
        objects = set()
    if objects:
        lines.append(
            f"DVC's cache: {len(objects)} shard objects ({', '.join(sorted(objects)[:3])} ...) and outs made from them; "
            "after the rebuild: dvc gc --workspace"
        )
    if try_git(layout.root, "config", "-f", ".dvc/config", "--get-regexp", r"\.url$"):
        lines.append("DVC's remote: after the rebuild: dvc push, then dvc gc --workspace --cloud")
    roots = [relative(layout, root) for root in folders.values()]
    committed = [f"{relative(layout, root)}/{name.removeprefix(prefix)}" for prefix, root in folders.items() for name in names]
    inside = sorted(path for path in committed if not path.startswith(".."))
    if inside and try_git(layout.root, "log", "--all", "-1", "--format=%H", "--", *inside):
        lines.append("git's history contains the raw file: rewrite it (git filter-repo) and have every clone replaced")
    if kept := find_worktrees(layout, item, roots):
        lines.append(
            f"worktrees of failed runs: {', '.join(relative(layout, path) for path in kept)}; "
            "git worktree remove --force removes one, and so does a later run"
        )
    return [*lines, "copies outside this project: backups, exports (sonify export), clones, caches of other machines"]


def find_worktrees(layout: ProjectPaths, item: TracedItem, roots: list[str]) -> list[Path]:
    """Kept worktrees of failed runs with a raw file of these bytes, or a media shard that may hold them."""
    prefix = try_git(layout.root, "rev-parse", "--show-prefix") or ""
    media = relative(layout, layout.media)
    found = []
    for folder in sorted((layout.runs / "worktrees").glob("*")):
        pools = [folder / prefix / root for root in roots]
        own = [pool for pool in pools if pool.resolve().is_relative_to(folder.resolve())]  # not a link to the project's pool
        shards = (path.name for path in (folder / prefix / media).glob("*.tar"))
        if any(raw_files(pool, item) for pool in own) or any(_may_hold(name, item) for name in shards):
            found.append(folder)
    return found


def _may_hold(shard: str, item: TracedItem) -> bool:
    stem = shard.removesuffix(".tar")
    return shard.endswith(".tar") and stem.startswith(f"{item.kind}-") and item.item_id.startswith(stem.split("-", 1)[1])


def execute_plan(layout: ProjectPaths, item: TracedItem, plan: DeletionPlan, reason: str) -> None:
    """Write the take-down first, then remove; an interrupted removal can be repeated."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for root in {path.resolve() for path in pool_folders(layout).values()}:  # a pool may be used by another project
        text = takedowns.load_takedowns(root) or ""
        rows = takedowns.append_rows(text, [(item.item_id, item.kind, now, reason)])
        write_bytes(root / takedowns.NAME, rows.encode("utf-8"))
    tables = _tables(layout, item, plan.files)
    for path in plan.files:
        path.unlink(missing_ok=True)
    for table in map(Path, plan.tables):
        kept = drop_csv_rows(table.read_bytes().decode("utf-8"), *tables[table])[0]
        write_bytes(table, kept.encode("utf-8"))
    for path in plan.cache_parts:
        rewrite_part(path, stage_of(layout, path), item.item_id)
    if plan.shard:
        rewrite_shard(layout.media, plan.shard, item.item_id)
    for path in plan.reports:
        path.unlink(missing_ok=True)


def rewrite_part(path: Path, stage: str, item_id: str) -> None:
    """Rewrite a cache part without the item's rows; its name is the hash of the new content. Other files are removed."""
    payload = path.read_bytes()
    if sha256_bytes(payload)[:32] != path.stem:
        path.unlink()
        return
    table = pq.ParquetFile(io.BytesIO(payload)).read()
    kept = table.filter([not may_derive_from(stage, str(key), item_id) for key in table["key"].to_pylist()])
    if kept.num_rows:
        buffer = io.BytesIO()
        pq.write_table(kept, buffer, **PARQUET)
        write_bytes(path.with_name(f"{sha256_bytes(buffer.getvalue())[:32]}.parquet"), buffer.getvalue())
    path.unlink(missing_ok=True)


def rewrite_shard(folder: Path, shard: str, item_id: str) -> None:
    """Rewrite the shard and the index without the item. The index is removed first: without it no reader uses the shards."""
    reader = MediaShardReader(folder)
    rows = [row for row in read_table(folder / INDEX, SHARD_INDEX).to_pylist() if row["item_id"] != item_id]
    mine = [row for row in rows if row["shard"] == shard]
    payloads = {str(row["item_id"]): reader.payload(str(row["item_id"])) for row in mine}
    with record_checksums("ingest", folder):
        (folder / INDEX).unlink()
        if mine:
            kind, prefix = str(mine[0]["kind"]), len(shard.removesuffix(".tar").split("-", 1)[1])
            fresh = write_shards(folder, kind, payloads, str(mine[0]["member"]).rsplit(".", 1)[-1], prefix)
        else:
            (folder / shard).unlink()
            fresh = []
        write_index(folder, [row for row in rows if row["shard"] != shard] + fresh)
