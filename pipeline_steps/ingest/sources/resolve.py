"""Where candidates come from: a metadata table, a known layout of somebody else, or a walk through every folder.

Tables, cards and archives are untrusted like the rest: they are read in decoding processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.safe_paths import UnsafePathError, display_path, resolve, validate_relative_path, walk_untrusted
from pipeline_steps.ingest.catalog import RejectedFile
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.ingest.file_signatures import extension, kind_of_name
from pipeline_steps.ingest.sources.archives import ArchiveJob, list_archive
from pipeline_steps.ingest.sources.dataset_layouts import (
    CARDS,
    PACKED,
    DatasetCardJob,
    DatasetFolderJob,
    detect_layouts,
    read_folder,
    read_license,
)
from pipeline_steps.ingest.sources.file_walk import DiscoveryResult, discover
from pipeline_steps.ingest.sources.metadata_table import (
    MetadataQuery,
    MetadataRow,
    MetadataTableJob,
    filter_rows,
    read_metadata_table,
)
from pipeline_steps.ingest.worker_pool import WorkerLimits, WorkerPool, core_count

TABLE_SECONDS = 300.0
"""Least time allowed to read a table or to list an archive."""


def table_bounds(config: IngestConfig, workers: int = 1) -> WorkerLimits:
    """Of a process that reads a table or lists an archive."""
    limits = config.limits
    return WorkerLimits(workers, max(TABLE_SECONDS, limits.timeout_seconds), limits.memory_mb * 1_000_000)


def collect_candidates(config: IngestConfig, root: Path) -> tuple[DiscoveryResult, int, dict[str, str]]:
    """Candidates below the root, the number of rows in neither filter, and the foreign layouts they came from, by folder."""
    biggest = config.picture.max_file_mb * 1e6
    if config.layout == "table" or (config.layout == "auto" and config.metadata is not None):
        listed, ignored = _from_metadata(config, root)
        return discover(root, listed, biggest, core_count()), ignored, {}
    if config.layout == "files":
        return discover(root, None, biggest, core_count()), 0, {}
    names = [name for name, what in walk_untrusted(root) if what == "file"]
    layouts = detect_layouts(names) if config.layout == "auto" else {"": config.layout}
    found = DiscoveryResult()
    ignored = 0
    if "" not in layouts:
        found.add(discover(root, None, biggest, core_count(), skip=tuple(layouts)))
    for prefix, layout in layouts.items():
        below = tuple(name for name in names if name.startswith(prefix))
        reader = _from_archives if layout in PACKED else _from_dataset_folder
        more, passed = reader(config, root, prefix, layout, below)
        found.add(more)
        ignored += passed
    return found, ignored, {prefix.rstrip("/") or ".": layout for prefix, layout in layouts.items()}


def ground_truth(config: IngestConfig, root: Path) -> list[dict[str, str]]:
    """Rows (kind, file, label, split, pair) of all items whose layout says them. Never part of a run of ingest."""
    names = [name for name, what in walk_untrusted(root) if what == "file"]
    rows: list[dict[str, str]] = []
    for prefix, layout in detect_layouts(names).items():
        below = tuple(name for name in names if name.startswith(prefix))
        if layout not in PACKED:
            with WorkerPool(table_bounds(config), read_folder) as workers:
                _, answer = next(
                    iter(workers.map([("", DatasetFolderJob(str(root.resolve()), prefix, layout, below, labels=True))]))
                )
            if "rows" not in answer:
                raise DataError(f"{answer.get('error') or answer.get('reason')}", "mend the table")
            rows += [_truth(row) for row in answer["rows"]]
            continue
        jobs = [
            (name, ArchiveJob(str(root.resolve()), resolve(root, name), None, None, None, math.inf, labels=True))
            for name in below
            if extension(name) in PACKED[layout]
        ]
        with WorkerPool(table_bounds(config), list_archive, ("pyarrow.parquet",)) as workers:
            for _, answer in workers.map(jobs):
                rows += answer.get("labels", [])
    return sorted(rows, key=lambda row: row["file"])


def _truth(row: Mapping[str, str | None]) -> dict[str, str]:
    kind = "image" if kind_of_name(row["file"] or "") == "image" else "sound"
    return {"kind": kind, **{name: row.get(name) or "" for name in ("file", "label", "split", "pair")}}


def _from_dataset_folder(
    config: IngestConfig, root: Path, prefix: str, layout: str, names: tuple[str, ...]
) -> tuple[DiscoveryResult, int]:
    """Files of a folder whose tables describe them."""
    job = DatasetFolderJob(str(root.resolve()), prefix, layout, names)
    with WorkerPool(table_bounds(config), read_folder) as workers:
        _, answer = next(iter(workers.map([("", job)])))
    if "rows" not in answer:
        raise DataError(f"{answer.get('error') or answer.get('reason')}", "mend the table, or set ingest.layout")
    wanted = MetadataQuery("file", "license", "author", ("source",), ("group",), *_split_filters(config))
    rows = ({name: value or "" for name, value in row.items()} for row in answer["rows"])
    listed, ignored = filter_rows(rows, wanted)
    return discover(root, listed, config.picture.max_file_mb * 1e6, core_count()), ignored


def _from_archives(
    config: IngestConfig, root: Path, prefix: str, layout: str, names: tuple[str, ...]
) -> tuple[DiscoveryResult, int]:
    """Media inside the archives or tables of a folder."""
    license = _set_license(config, root, prefix, names)
    pool, holdout = _split_filters(config)
    found = DiscoveryResult()
    jobs = []
    for name in names:
        if extension(name) not in PACKED[layout]:
            found.passed_over[f".{extension(name)}" if extension(name) else "no extension"] += 1
            continue
        try:
            relative = resolve(root, name)
        except UnsafePathError as error:
            found.refused.append(RejectedFile(display_path(name), "unknown", error.code, error.reason))
            continue
        jobs.append((name, ArchiveJob(str(root.resolve()), relative, license, pool, holdout, config.picture.max_file_mb * 1e6)))
    if not jobs:
        raise DataError(f"ingest.layout: {root}/{prefix} holds no {' or '.join(PACKED[layout])} file", "correct ingest.layout")
    count = min(config.limits.workers or core_count(), len(jobs))
    ignored = 0
    with WorkerPool(table_bounds(config, count), list_archive, ("pyarrow.parquet",)) as workers:
        for name, answer in workers.map(jobs):
            if "files" not in answer:  # hung, crashed or too large for the process
                found.refused.append(RejectedFile(display_path(name), "unknown", answer["code"], answer["reason"]))
                continue
            found.files += answer["files"]
            found.refused += answer["refused"]
            ignored += answer["ignored"]
    found.files.sort(key=lambda file: file.shown)
    return found, ignored


def _set_license(config: IngestConfig, root: Path, prefix: str, names: tuple[str, ...]) -> str | None:
    """License of a whole data set, from the card or the description beside it."""
    cards = tuple(name for name in names if name.rsplit("/", 1)[-1] in CARDS)
    if not cards:
        return None
    with WorkerPool(table_bounds(config), read_license) as workers:
        _, answer = next(iter(workers.map([("", DatasetCardJob(str(root.resolve()), cards))])))
    license = answer.get("license")
    return str(license) if license else None


def _split_filters(config: IngestConfig) -> tuple[dict[str, tuple[str, ...]] | None, dict[str, tuple[str, ...]] | None]:
    """The filters, which in a foreign layout know one column."""
    for key, rows in (("pool", config.pool), ("holdout", config.holdout)):
        other = sorted(set(rows or {}) - {"split"})
        if other:
            raise ConfigError(f"ingest.{key}: {other[0]} is unknown in a foreign layout", "it knows the column split alone")
    return _values(config.pool), _values(config.holdout)


def _from_metadata(config: IngestConfig, root: Path) -> tuple[list[MetadataRow], int]:
    """Rows of the metadata table and the number of rows in neither filter."""
    if config.metadata is None:
        raise ConfigError("ingest.layout is table and ingest.metadata is null", "name the table, or set layout to auto")
    columns = config.columns
    wanted = MetadataQuery(
        columns.file, columns.license, columns.author, _names(columns.source), _names(columns.group),
        _values(config.pool), _values(config.holdout),
    )  # fmt: skip
    try:
        relative = resolve(root, validate_relative_path(config.metadata))
    except UnsafePathError as error:
        raise ConfigError(
            f"ingest.metadata: {config.metadata}: {error.reason}", "name a table inside ingest.root, or null"
        ) from error
    preload = ("pyarrow.parquet",) if relative.endswith((".parquet", ".pq")) else ()
    with WorkerPool(table_bounds(config), read_metadata_table, preload) as workers:  # the table is untrusted like the rest
        _, answer = next(iter(workers.map([("", MetadataTableJob(str(root.resolve()), relative, wanted))])))
    if "rows" not in answer:
        raise DataError(f"{config.metadata}: {answer.get('error') or answer.get('reason')}", "mend the table or ingest.columns")
    return answer["rows"], answer["ignored"]


def _names(columns: str | list[str] | None) -> tuple[str, ...]:
    return () if columns is None else (columns,) if isinstance(columns, str) else tuple(columns)


def _values(rows: Mapping[str, str | list[str]] | None) -> dict[str, tuple[str, ...]] | None:
    return None if rows is None else {column: _names(values) for column, values in rows.items()}
