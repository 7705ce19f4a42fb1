"""`sonify forget`: remove an image or audio clip, and list copies that cannot be removed from here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from pipeline_steps.tracking.registry.item_trace import ItemTrace, TracedItem

TABLES = (("ingest", "metadata"), ("evaluate", "ground_truth"))
"""Parameters with the path of a table that has one row per file."""


@dataclass
class DeletionPlan:
    """Files and rows that the removal of an item affects.

    Attributes:
        files: raw files with these bytes.
        tables: CSV table -> number of rows that name one of the item's paths.
        cache: parts of the result cache with results of the item, or of mixtures that may contain it.
        shard: media shard with the item, else None.
        reports: files of the reports and of `.runs` named after it.
        rebuild: what becomes stale, with the command that rebuilds it.
        beyond: copies that cannot be removed from here, with the required action.
    """

    files: list[Path] = field(default_factory=list)
    tables: dict[Path, int] = field(default_factory=dict)
    cache: list[Path] = field(default_factory=list)
    shard: str | None = None
    reports: list[Path] = field(default_factory=list)
    rebuild: list[str] = field(default_factory=list)
    beyond: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "files": [str(path) for path in self.files],
            "tables": {str(path): rows for path, rows in self.tables.items()},
            "cache_parts": [str(path) for path in self.cache],
            "shard": self.shard,
            "reports": [str(path) for path in self.reports],
            "rebuild": self.rebuild,
            "beyond": self.beyond,
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        lines = [f"raw file       {path}" for path in self.files]
        lines += [f"table          {rows} rows of {path}" for path, rows in self.tables.items()]
        lines += [f"result cache   {len(self.cache)} parts"] if self.cache else []
        lines += [f"media shard    {self.shard}"] if self.shard else []
        lines += [f"reports, runs  {len(self.reports)} files"] if self.reports else []
        lines += ["", "to be rebuilt:", *(f"  {text}" for text in self.rebuild)]
        return [*lines, "", "not reached from here:", *(f"  {text}" for text in self.beyond)]


@handle_errors
def forget(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="ITEM", help="Id (or its beginning) of an image or audio clip, or its path.")],
    reason: Annotated[str, typer.Option(help="Why; is written into takedowns.csv.")] = "take-down",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove an item from pool, result cache and shards, and list what must be rebuilt and what cannot be removed."""
    from pipeline_steps.commands.doctor import check_unlocked
    from pipeline_steps.tracking.registry.item_trace import find_items, trace_item

    layout = layout_of(context)
    items = find_items(layout, what)
    if not items:
        raise DataError(f"{what!r} is not an item of a catalog and not a file of the pool", "sonify trace, or dvc repro ingest")
    item = items[0]
    if as_json and not (yes or dry_run):
        raise ConfigError("--json asks no questions", "add --yes or --dry-run")
    plan = plan_deletion(layout, item, trace_item(layout, item))
    name = f"{'image' if item.kind == 'image' else 'audio clip'} {item.item_id}"
    if dry_run:
        print_result({"item": item.item_id, "done": False, **plan.as_dict()}, [f"would forget {name}", *plan.lines()], as_json)
        return
    check_unlocked(layout)
    if not yes:
        for line in plan.lines():
            print(line)
        typer.confirm(f"remove {name} for good?", abort=True)
    execute_plan(layout, item, plan, reason)
    print_result({"item": item.item_id, "done": True, **plan.as_dict()}, [f"forgot {name}", *plan.lines()], as_json)


def plan_deletion(layout: ProjectPaths, item: TracedItem, trace: ItemTrace) -> DeletionPlan:
    """Find everything that holds the item; changes nothing."""
    from pipeline_steps.tracking.registry.item_trace import pool_root

    root = pool_root(layout)
    plan = DeletionPlan()
    plan.files = raw_files(root, item)
    names = {*item.sources, *(path.relative_to(root).as_posix() for path in plan.files)}
    plan.tables, unread = tables_with(layout, names)
    plan.cache = cache_parts(layout, item.item_id)
    plan.shard = shard_of(layout, item.item_id)
    plan.reports = [
        path
        for folder in (layout.reports, layout.runs)
        if folder.is_dir()
        for path in sorted(folder.rglob(f"*{item.item_id}*"))
        if path.is_file()
    ]
    used = {use.split for use in trace.pairs}
    plan.rebuild = ["ingest and all stages after it: dvc repro"]
    learned = [use.version for use in trace.versions if use.splits.keys() & {"train", "val"}]
    tested = [use.version for use in trace.versions if "test" in use.splits or item.holdout]
    if used & {"train", "val"}:
        plan.rebuild.append("the model, because it learned from the item: dvc repro train (part of the above)")
    archives = sorted({name for name in item.sources if not (root / name).exists()})
    if archives and not plan.files:
        plan.beyond.append(f"bytes inside archives, tables or removed files of the pool: {', '.join(archives)}; rewrite them")
    plan.beyond += [f"{path}: only CSV tables are rewritten here; remove its rows by hand" for path in unread]
    plan.beyond += model_traces(layout, learned, tested, trace)
    plan.beyond += stored_copies(layout, item, [path.relative_to(root).as_posix() for path in plan.files])
    return plan


def raw_files(root: Path, item: TracedItem) -> list[Path]:
    """Every file below the pool's root with the item's bytes, whatever its name and whether or not a table lists it."""
    from pipeline_steps.core.hashing import ID_LENGTH, sha256_file

    found = []
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        if sha256_file(path)[:ID_LENGTH] == item.item_id:
            found.append(path)
    return found


def tables_with(layout: ProjectPaths, names: set[str]) -> tuple[dict[Path, int], list[Path]]:
    """CSV tables of the parameters with the number of rows that name one of `names`; and tables of other formats."""
    from pipeline_steps.core.config import load_params

    params = load_params(layout.params)
    root = layout.root / str(params["ingest"]["root"])
    column = str(params["ingest"].get("columns", {}).get("file", "file"))
    found: dict[Path, int] = {}
    unread = []
    for section, key in TABLES:
        name = params.get(section, {}).get(key)
        path = (root if section == "ingest" else layout.root) / str(name)
        if not name or not path.is_file() or path.resolve() in {table.resolve() for table in found}:
            continue
        if path.suffix.lower() != ".csv":
            unread.append(path)
            continue
        dropped = drop_csv_rows(read_text_verbatim(path), column, names)[1]
        if dropped:
            found[path] = dropped
    return found, unread


def read_text_verbatim(path: Path) -> str:
    """Text with its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def drop_csv_rows(text: str, column: str, names: set[str]) -> tuple[str, int]:
    """Drop CSV rows whose `column` is one of `names`, keep all other bytes; returns text and number of dropped rows."""
    import csv
    import io

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
    import pyarrow.parquet as pq

    found = []
    for path in sorted(layout.result_cache.rglob("*.parquet")) if layout.result_cache.is_dir() else ():
        stage = path.relative_to(layout.result_cache).parts[0]
        try:
            keys = pq.ParquetFile(path).read(columns=["key"])["key"].to_pylist()
        except (OSError, ValueError):
            continue
        if any(may_derive_from(stage, str(key), item_id) for key in keys):
            found.append(path)
    return found


def may_derive_from(stage: str, key: str, item_id: str) -> bool:
    """Whether a result may derive from the item. Keys of mixtures are hashes without item ids, so these always may."""
    mixture = stage == "train" or (stage == "evaluate-sound" and len(key) != len(item_id))
    return mixture or item_id in key


def shard_of(layout: ProjectPaths, item_id: str) -> str | None:
    """Name of the shard in `data/media` that holds the item."""
    from pipeline_steps.core.media_shards import INDEX
    from pipeline_steps.core.schemas import SHARD_INDEX
    from pipeline_steps.core.tables import read_table

    path = layout.media / INDEX
    rows = read_table(path, SHARD_INDEX).to_pylist() if path.is_file() else []
    return next((str(row["shard"]) for row in rows if row["item_id"] == item_id), None)


def model_traces(layout: ProjectPaths, learned: list[str], tested: list[str], trace: ItemTrace) -> list[str]:
    """Model versions that used the item, and their artifacts in MLflow."""
    lines = []
    if learned:
        lines.append(
            f"model versions {', '.join(learned)} learned from it: train without it, promote, then delete them in MLflow"
        )
    if tested:
        lines.append(
            f"model versions {', '.join(tested)} were evaluated with it: artifacts of their evaluation runs may show it"
        )
    unknown = [use.version for use in trace.versions if not use.pairs_available]
    if unknown:
        lines.append(f"model versions {', '.join(unknown)}: their pairs are not in DVC's cache, so their use of it is unknown")
    if trace.versions_problem:
        lines.append(f"MLflow is unreachable: {trace.versions_problem}")
    return lines


def stored_copies(layout: ProjectPaths, item: TracedItem, relative: list[str]) -> list[str]:
    """Copies in DVC's cache, its remotes and git's history."""
    from pipeline_steps.core.config import load_params
    from pipeline_steps.core.errors import StageError
    from pipeline_steps.core.git import try_git
    from pipeline_steps.tracking.lineage.lock_history import DvcCache, iter_lock_history

    lines = []
    name = layout.media.relative_to(layout.root).as_posix()
    outs = {
        str(out["md5"])
        for lock in iter_lock_history(layout)
        for stage in lock.content["stages"].values()
        for out in stage.get("outs", ())
        if out.get("path") == name and "md5" in out
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
    remotes = (try_git(layout.root, "config", "-f", ".dvc/config", "--get-regexp", r"\.url$") or "").splitlines()
    if remotes:
        lines.append("DVC's remote: after the rebuild: dvc push, then dvc gc --workspace --cloud")
    root = str(load_params(layout.params)["ingest"]["root"])
    paths = [f"{root}/{path}" for path in dict.fromkeys([*relative, *item.sources])]
    if (try_git(layout.root, "log", "--all", "-1", "--format=%H", "--", *paths) or "").strip():
        lines.append("git's history holds the raw file: rewrite it (git filter-repo) and have every clone replaced")
    if kept := find_worktrees(layout, item, root):
        lines.append(
            f"worktrees of failed runs: {', '.join(path.relative_to(layout.root).as_posix() for path in kept)}; "
            "git worktree remove --force removes one, and so does a later run"
        )
    if not any(Path(layout.root / path).exists() for path in paths) or relative:
        lines.append("copies outside this project: backups, exports (sonify export), clones, caches of other machines")
    return lines


def find_worktrees(layout: ProjectPaths, item: TracedItem, root: str) -> list[Path]:
    """Kept worktrees of failed runs with a raw file of these bytes, or a media shard that may hold them."""
    from pipeline_steps.core.git import try_git

    prefix = (try_git(layout.root, "rev-parse", "--show-prefix") or "").strip()
    media = layout.media.relative_to(layout.root)
    found = []
    for folder in sorted((layout.runs / "worktrees").glob("*")):
        pool = folder / prefix / root
        own = pool.resolve().is_relative_to(folder.resolve())  # not a link to the project's pool
        shards = (path.name for path in (folder / prefix / media).glob("*.tar"))
        if (own and raw_files(pool, item)) or any(_may_hold(name, item) for name in shards):
            found.append(folder)
    return found


def _may_hold(shard: str, item: TracedItem) -> bool:
    stem = shard.removesuffix(".tar")
    return shard.endswith(".tar") and stem.startswith(f"{item.kind}-") and item.item_id.startswith(stem.split("-", 1)[1])


def execute_plan(layout: ProjectPaths, item: TracedItem, plan: DeletionPlan, reason: str) -> None:
    """Write the take-down first, then remove; an interrupted removal can be repeated."""
    from pipeline_steps.core.atomic import write_bytes
    from pipeline_steps.core.config import load_params
    from pipeline_steps.ingest import takedowns
    from pipeline_steps.tracking.registry.item_trace import pool_root

    root = pool_root(layout)
    listing = root / takedowns.NAME
    text = takedowns.load_takedowns(root) or ""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_bytes(listing, takedowns.append_rows(text, [(item.item_id, item.kind, now, reason)]).encode("utf-8"))
    names = {*item.sources, *(path.relative_to(root).as_posix() for path in plan.files)}
    for path in plan.files:
        path.unlink(missing_ok=True)
    column = str(load_params(layout.params)["ingest"].get("columns", {}).get("file", "file"))
    for path in plan.tables:
        write_bytes(path, drop_csv_rows(read_text_verbatim(path), column, names)[0].encode("utf-8"))
    for path in plan.cache:
        rewrite_part(path, path.relative_to(layout.result_cache).parts[0], item.item_id)
    if plan.shard:
        rewrite_shard(layout, plan.shard, item.item_id)
    for path in plan.reports:
        path.unlink(missing_ok=True)


def rewrite_part(path: Path, stage: str, item_id: str) -> None:
    """Rewrite a cache part without the item's rows; its name is the hash of the new content."""
    import io

    import pyarrow.parquet as pq

    from pipeline_steps.core.atomic import write_bytes
    from pipeline_steps.core.hashing import sha256_bytes

    table = pq.ParquetFile(path).read()
    kept = table.filter([not may_derive_from(stage, str(key), item_id) for key in table["key"].to_pylist()])
    if kept.num_rows:
        buffer = io.BytesIO()
        pq.write_table(kept, buffer, compression="zstd")
        write_bytes(path.with_name(f"{sha256_bytes(buffer.getvalue())[:32]}.parquet"), buffer.getvalue())
    path.unlink(missing_ok=True)


def rewrite_shard(layout: ProjectPaths, shard: str, item_id: str) -> None:
    """Rewrite the shard and the index without the item. The index is removed first: without it no reader uses the shards."""
    from pipeline_steps.core.media_shards import INDEX, MediaShardReader, write_index, write_shards
    from pipeline_steps.core.schemas import SHARD_INDEX
    from pipeline_steps.core.tables import read_table

    folder = layout.media
    reader = MediaShardReader(folder)
    rows = [row for row in read_table(folder / INDEX, SHARD_INDEX).to_pylist() if row["item_id"] != item_id]
    mine = [row for row in rows if row["shard"] == shard]
    payloads = {str(row["item_id"]): reader.payload(str(row["item_id"])) for row in mine}
    (folder / INDEX).unlink()
    if mine:
        kind, prefix = str(mine[0]["kind"]), len(shard.removesuffix(".tar").split("-", 1)[1])
        fresh = write_shards(folder, kind, payloads, str(mine[0]["member"]).rsplit(".", 1)[-1], prefix)
    else:
        (folder / shard).unlink()
        fresh = []
    write_index(folder, [row for row in rows if row["shard"] != shard] + fresh)
