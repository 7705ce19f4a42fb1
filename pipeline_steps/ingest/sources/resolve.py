"""Collect candidates from the configured source: a metadata table, data sets in known layouts, or a walk.

Tables, dataset cards and archives are untrusted, so they are read in decoding processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.safe_paths import UnsafePathError, display_path, resolve, validate_relative_path, walk_untrusted
from pipeline_steps.ingest.candidates import DiscoveryResult, RejectedFile
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.ingest.file_signatures import extension, kind_from_extension
from pipeline_steps.ingest.sources.archives import ArchiveJob, list_archive
from pipeline_steps.ingest.sources.dataset_layouts import (
    ARCHIVE_EXTENSIONS,
    CARD_FILES,
    DatasetFolderJob,
    Row,
    detect_layouts,
    read_dataset_folder,
)
from pipeline_steps.ingest.sources.file_walk import discover_files, extension_label
from pipeline_steps.ingest.sources.metadata_table import (
    MetadataQuery,
    MetadataTableJob,
    RowFilter,
    read_metadata_table,
)
from pipeline_steps.ingest.worker_pool import WorkerLimits, WorkerPool, core_count, run_in_process

MIN_TABLE_SECONDS = 300.0
"""Least time limit for reading a table or listing an archive."""

ARCHIVE_PRELOAD = ("pyarrow.parquet",)


class Dataset(NamedTuple):
    """Folder in a known layout: `prefix` is "" or "folder/", `names` are the files below it with the prefix."""

    prefix: str
    layout: str
    names: tuple[str, ...]


def collect_candidates(config: IngestConfig, root: Path) -> DiscoveryResult:
    """Candidates below `root`, from the source that `ingest.layout` and `ingest.metadata` select.

    Raises:
        ConfigError: the table, or a column of a filter, does not exist.
        DataError: a table cannot be used, or a named layout has no files.
    """
    max_image_bytes = config.image.max_file_bytes
    if config.layout == "table" or (config.layout == "auto" and config.metadata is not None):
        return _from_metadata(config, root)
    if config.layout == "files":
        return discover_files(root, None, max_image_bytes)
    datasets = find_datasets(root, config.layout)
    result = DiscoveryResult(layouts={dataset.prefix.rstrip("/") or ".": dataset.layout for dataset in datasets})
    if all(dataset.prefix for dataset in datasets):
        result.merge(discover_files(root, None, max_image_bytes, skip=tuple(dataset.prefix for dataset in datasets)))
    for dataset in datasets:
        read = _from_archives if dataset.layout in ARCHIVE_EXTENSIONS else _from_dataset_folder
        result.merge(read(config, root, dataset))
    return result


def _is_hidden(name: str) -> bool:
    return name.rsplit("/", 1)[-1].startswith(".")


def find_datasets(root: Path, layout: str = "auto") -> list[Dataset]:
    """Data sets below `root`: the root itself in the given layout or, with "auto", every folder whose layout is detected."""
    names = [name for name, what in walk_untrusted(root) if what == "file" and not _is_hidden(name)]
    layouts = detect_layouts(names) if layout == "auto" else {"": layout}
    return [
        Dataset(prefix, found, tuple(name for name in names if name.startswith(prefix))) for prefix, found in layouts.items()
    ]


def collect_ground_truth(config: IngestConfig, root: Path) -> list[dict[str, str]]:
    """Rows (kind, file, label, split, pair) of all items with labels in a known layout. The stage never calls this."""
    rows: list[dict[str, str]] = []
    for dataset in find_datasets(root):
        if dataset.layout not in ARCHIVE_EXTENSIONS:
            rows += [_ground_truth_row(row) for row in _read_dataset(config, root, dataset, None)["rows"]]
            continue
        jobs = []
        for name in dataset.names:
            with suppress(UnsafePathError):  # ingest rejects it
                if extension(name) in ARCHIVE_EXTENSIONS[dataset.layout]:
                    relative = resolve(root, name)
                    jobs.append((name, ArchiveJob(str(root.resolve()), relative, (), None, None, math.inf, labels=True)))
        with WorkerPool(table_limits(config), list_archive, ARCHIVE_PRELOAD) as workers:
            for _, answer in workers.map(jobs):
                rows += answer.get("labels", [])
    return sorted(rows, key=lambda row: row["file"])


def table_limits(config: IngestConfig, workers: int = 1) -> WorkerLimits:
    """Limits of processes that read tables or list archives."""
    decoder = config.decoder
    return WorkerLimits(workers, max(MIN_TABLE_SECONDS, decoder.timeout_seconds), decoder.memory_mb * 1_000_000)


def _ground_truth_row(row: Row) -> dict[str, str]:
    kind = "image" if kind_from_extension(row["file"] or "") == "image" else "sound"
    return {"kind": kind, **{name: row.get(name) or "" for name in ("file", "label", "split", "pair")}}


def _read_dataset(config: IngestConfig, root: Path, dataset: Dataset, query: MetadataQuery | None) -> dict[str, Any]:
    job = DatasetFolderJob(str(root.resolve()), *dataset, query)
    answer: dict[str, Any] = run_in_process(table_limits(config), read_dataset_folder, job)
    if "rows" not in answer:
        raise DataError(str(answer.get("error") or answer.get("reason")), "fix the table, or set ingest.layout")
    return answer


def _from_dataset_folder(config: IngestConfig, root: Path, dataset: Dataset) -> DiscoveryResult:
    """Files of a data set that its tables describe."""
    query = MetadataQuery("file", "license", "author", ("source",), ("group",), *_split_filters(config))
    return _listed_files(config, root, _read_dataset(config, root, dataset, query))


def _listed_files(config: IngestConfig, root: Path, answer: dict[str, Any]) -> DiscoveryResult:
    result = discover_files(root, answer["rows"], config.image.max_file_bytes)
    result.filtered_rows = answer["filtered"]
    return result


def _from_archives(config: IngestConfig, root: Path, dataset: Dataset) -> DiscoveryResult:
    """Media in the archives or tables of a data set."""
    cards = tuple(name for name in dataset.names if name.rsplit("/", 1)[-1] in CARD_FILES)
    filters = _split_filters(config)
    result = DiscoveryResult()
    jobs = []
    extensions = ARCHIVE_EXTENSIONS[dataset.layout]
    for name in dataset.names:
        if extension(name) not in extensions:
            result.skipped_files[extension_label(name)] += 1
            continue
        try:
            relative = resolve(root, name)
        except UnsafePathError as error:
            result.rejected.append(RejectedFile(display_path(name), "unknown", error.code, error.reason))
            continue
        jobs.append((name, ArchiveJob(str(root.resolve()), relative, cards, *filters, config.image.max_file_bytes)))
    if not jobs and not result.rejected:
        raise DataError(
            f"ingest.layout: {root}/{dataset.prefix} holds no {' or '.join(extensions)} file", "correct ingest.layout"
        )
    limits = table_limits(config, min(config.decoder.workers or core_count(), len(jobs)))
    with WorkerPool(limits, list_archive, ARCHIVE_PRELOAD) as workers:
        for name, answer in workers.map(jobs):
            if "files" not in answer:  # killed, crashed or out of memory
                result.rejected.append(RejectedFile(display_path(name), "unknown", answer["code"], answer["reason"]))
                continue
            result.files += answer["files"]
            result.rejected += answer["rejected"]
            result.filtered_rows += answer["filtered"]
            result.skipped_files.update(answer["skipped"])
    result.files.sort(key=lambda file: file.path)
    return result


def _split_filters(config: IngestConfig) -> tuple[RowFilter | None, RowFilter | None]:
    """Filters `pool` and `holdout` for data sets in known layouts, whose only column is `split`."""
    for key, rows in (("pool", config.pool), ("holdout", config.holdout)):
        others = sorted(set(rows or {}) - {"split"})
        if others:
            raise ConfigError(f"ingest.{key}: column {others[0]!r} does not exist in this layout", "filter by `split` only")
    return _row_filter(config.pool), _row_filter(config.holdout)


def _from_metadata(config: IngestConfig, root: Path) -> DiscoveryResult:
    """Files that the metadata table lists."""
    if config.metadata is None:
        raise ConfigError("ingest.layout is table and ingest.metadata is null", "name the table, or set layout to auto")
    columns = config.columns
    query = MetadataQuery(
        columns.file, columns.license, columns.author, _as_tuple(columns.source), _as_tuple(columns.group),
        _row_filter(config.pool), _row_filter(config.holdout),
    )  # fmt: skip
    try:
        relative = resolve(root, validate_relative_path(config.metadata))
    except UnsafePathError as error:
        raise ConfigError(
            f"ingest.metadata: {config.metadata}: {error.reason}", "name a table inside ingest.root, or null"
        ) from error
    preload = ARCHIVE_PRELOAD if relative.endswith((".parquet", ".pq")) else ()
    job = MetadataTableJob(str(root.resolve()), relative, query)
    answer = run_in_process(table_limits(config), read_metadata_table, job, preload)
    if "rows" not in answer:
        raise DataError(f"{config.metadata}: {answer.get('error') or answer.get('reason')}", "fix the table or ingest.columns")
    return _listed_files(config, root, answer)


def _as_tuple(values: str | list[str] | None) -> tuple[str, ...]:
    return () if values is None else (values,) if isinstance(values, str) else tuple(values)


def _row_filter(rows: Mapping[str, str | list[str]] | None) -> RowFilter | None:
    return None if rows is None else {column: _as_tuple(values) for column, values in rows.items()}
