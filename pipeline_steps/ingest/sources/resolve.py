"""Collect candidates from the configured sources; each is a metadata table, data sets in known layouts, or a walk.

Tables, dataset cards and archives are untrusted, so they are read in decoding processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.safe_paths import UnsafePathError, display_path, resolve, validate_relative_path, walk_untrusted
from pipeline_steps.ingest.candidates import DiscoveryResult, RejectedFile
from pipeline_steps.ingest.config import SOURCE_KEYS, IngestConfig, PoolConfig
from pipeline_steps.ingest.file_signatures import extension, kind_from_extension
from pipeline_steps.ingest.license_ids import spdx_id
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
from pipeline_steps.ingest.takedowns import apply_takedowns
from pipeline_steps.ingest.worker_pool import WorkerLimits, WorkerPool, core_count, run_in_process

MIN_TABLE_SECONDS = 300.0
"""Least time limit for reading a table or listing an archive."""

ARCHIVE_PRELOAD = ("pyarrow.parquet",)


class Dataset(NamedTuple):
    """Folder in a known layout: `prefix` is "" or "folder/", `names` are the files below it with the prefix."""

    prefix: str
    layout: str
    names: tuple[str, ...]


class Source(NamedTuple):
    """One folder of raw media.

    Attributes:
        root: the folder.
        settings: how to read it.
        config: limits of all sources.
        key: name of the settings in `params.yaml`, for error messages.
        name: name of the pool; empty in the form with one root.
        link_roots: folders outside `root` into which links may lead.
    """

    root: Path
    settings: PoolConfig
    config: IngestConfig
    key: str = "ingest"
    name: str = ""
    link_roots: tuple[Path, ...] = ()

    @property
    def prefix(self) -> str:
        """First part of the paths of its files in every table."""
        return f"{self.name}/" if self.name else ""


def list_sources(config: IngestConfig, project: Path) -> list[Source]:
    """Sources of the configuration; their folders exist.

    Args:
        config: section `ingest`.
        project: folder to which relative roots refer.

    Raises:
        ConfigError: there is none, or a folder does not exist.
    """
    pools = {f"ingest.pools.{name}": (name, pool) for name, pool in config.pools.items()}
    if not pools:
        if config.root is None:
            raise ConfigError("neither ingest.root nor ingest.pools is set", "name the folders that contain images and audio")
        shared = {name: getattr(config, name) for name in SOURCE_KEYS}
        pools = {"ingest": ("", PoolConfig.model_construct(**shared))}
    for key, folders in (
        *((f"{key}.root", [pool.root]) for key, (_, pool) in pools.items()),
        ("ingest.link_roots", config.link_roots),
    ):
        for folder in folders:
            if not (project / folder).is_dir():
                raise ConfigError(f"{key}: {project / folder} is not a folder", "name the folder that contains your files")
    roots = [project / folder for folder in (*(pool.root for _, pool in pools.values()), *config.link_roots)]
    return [
        Source(project / pool.root, pool, config, key, name, tuple(root for root in roots if root != project / pool.root))
        for key, (name, pool) in pools.items()
    ]


def collect_all_candidates(config: IngestConfig, project: Path) -> DiscoveryResult:
    """Candidates of all sources, without those on the take-down lists. Nothing is decoded or written.

    Raises:
        ConfigError, DataError: as `list_sources`, `collect_candidates` and `apply_takedowns`.
    """
    sources = list_sources(config, project)
    result = DiscoveryResult()
    for source in sources:
        result.merge(collect_candidates(source))
    apply_takedowns([source.root for source in sources], result)
    return result


def collect_candidates(source: Source) -> DiscoveryResult:
    """Candidates of one source. Their paths begin with the name of the pool.

    Raises:
        ConfigError: the table, or a column of a filter, does not exist.
        DataError: a table cannot be used, or a named layout has no files.
    """
    found, pool = _read_source(source), source.settings
    if pool.kind != "mixed":
        other = "audio" if pool.kind == "images" else "image"
        kept = [file for file in found.files if file.kind != other]
        rejected = [item for item in found.rejected if item.kind != other]
        if skipped := found.count - len(kept) - len(rejected):
            found.skipped_files[f"{other} in pool {source.name}"] += skipped
        found.files, found.rejected = kept, rejected
    license, holdout = spdx_id(pool.license), pool.role == "holdout"
    if license or holdout or source.prefix:
        found.files = [
            replace(
                file,
                path=source.prefix + file.path,
                license=file.license or license,
                holdout=file.holdout or holdout,
                group=file.group and source.prefix + file.group,
            )
            for file in found.files
        ]
        found.rejected = [replace(item, path=source.prefix + item.path) for item in found.rejected]
        found.layouts = {
            source.prefix.rstrip("/") if folder == "." else source.prefix + folder: layout
            for folder, layout in found.layouts.items()
        }
    return found


def _read_source(source: Source) -> DiscoveryResult:
    root, settings, links = source.root, source.settings, source.link_roots
    max_image_bytes = source.config.image.max_file_bytes
    if settings.layout == "table" or (settings.layout == "auto" and settings.metadata is not None):
        return _from_metadata(source)
    if settings.layout == "files":
        return discover_files(root, None, max_image_bytes, link_roots=links)
    datasets = find_datasets(root, settings.layout)
    result = DiscoveryResult(layouts={dataset.prefix.rstrip("/") or ".": dataset.layout for dataset in datasets})
    if all(dataset.prefix for dataset in datasets):
        skip = tuple(dataset.prefix for dataset in datasets)
        result.merge(discover_files(root, None, max_image_bytes, skip, links))
    for dataset in datasets:
        read = _from_archives if dataset.layout in ARCHIVE_EXTENSIONS else _from_dataset_folder
        result.merge(read(source, dataset))
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


def _read_dataset(
    config: IngestConfig, root: Path, dataset: Dataset, query: MetadataQuery | None, key: str = "ingest"
) -> dict[str, Any]:
    job = DatasetFolderJob(str(root.resolve()), *dataset, query)
    answer: dict[str, Any] = run_in_process(table_limits(config), read_dataset_folder, job)
    if "rows" not in answer:
        raise DataError(str(answer.get("error") or answer.get("reason")), f"fix the table, or set {key}.layout")
    return answer


def _from_dataset_folder(source: Source, dataset: Dataset) -> DiscoveryResult:
    """Files of a data set that its tables describe."""
    text = ("caption",) if dataset.layout == "coco" and "caption" in _as_tuple(source.settings.columns.text) else ()
    query = MetadataQuery("file", "license", "author", ("source",), ("group",), *_split_filters(source), text)
    return _listed_files(source, _read_dataset(source.config, source.root, dataset, query, source.key))


def _listed_files(source: Source, answer: dict[str, Any]) -> DiscoveryResult:
    rows = [row for row in answer["rows"] if not _is_other_kind(source, row.file)]
    result = discover_files(source.root, rows, source.config.image.max_file_bytes, link_roots=source.link_roots)
    if len(rows) < len(answer["rows"]):
        result.skipped_files[f"rows of another kind than pool {source.name}"] += len(answer["rows"]) - len(rows)
    result.filtered_rows = answer["filtered"]
    return result


def _is_other_kind(source: Source, name: str) -> bool:
    """Whether the extension of a listed file is of a kind that the pool skips; the file need not exist."""
    wanted = {"images": "image", "audio": "audio"}.get(source.settings.kind)
    return wanted is not None and kind_from_extension(name) not in {wanted, "unknown"}


def _from_archives(source: Source, dataset: Dataset) -> DiscoveryResult:
    """Media in the archives or tables of a data set."""
    config, root = source.config, source.root
    cards = tuple(name for name in dataset.names if name.rsplit("/", 1)[-1] in CARD_FILES)
    filters = _split_filters(source)
    text = tuple(name.lower() for name in _as_tuple(source.settings.columns.text))
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
        job = ArchiveJob(str(root.resolve()), relative, cards, *filters, config.image.max_file_bytes, text=text)
        jobs.append((name, job))
    if not jobs and not result.rejected:
        raise DataError(
            f"{source.key}.layout: {root}/{dataset.prefix} holds no {' or '.join(extensions)} file",
            f"correct {source.key}.layout",
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


def _split_filters(source: Source) -> tuple[RowFilter | None, RowFilter | None]:
    """Filters `pool` and `holdout` for data sets in known layouts, whose only column is `split`."""
    settings = source.settings
    for key, rows in (("pool", settings.pool), ("holdout", settings.holdout)):
        others = sorted(set(rows or {}) - {"split"})
        if others:
            raise ConfigError(
                f"{source.key}.{key}: column {others[0]!r} does not exist in this layout", "filter by `split` only"
            )
    return _row_filter(settings.pool), _row_filter(settings.holdout)


def _from_metadata(source: Source) -> DiscoveryResult:
    return _listed_files(source, read_source_table(source))


def read_source_table(source: Source, label: str | None = None) -> dict[str, Any]:
    """`rows` of a source's metadata table in its filters, and the number `filtered` of the others.

    Args:
        source: a source with a table.
        label: column whose values are the `text` of the rows, for `sonify labels`; None: those of `columns.text`.
    """
    settings, key = source.settings, source.key
    if settings.metadata is None:
        raise ConfigError(f"{key}.layout is table and {key}.metadata is null", "name the table, or set layout to auto")
    columns = settings.columns
    query = MetadataQuery(
        columns.file, columns.license, columns.author, _as_tuple(columns.source), _as_tuple(columns.group),
        _row_filter(settings.pool), _row_filter(settings.holdout), _as_tuple(label or columns.text),
    )  # fmt: skip
    table = Path(settings.metadata)
    folder = table.parent if table.is_absolute() else source.root
    try:
        relative = resolve(folder, table.name if table.is_absolute() else validate_relative_path(settings.metadata))
    except UnsafePathError as error:
        raise ConfigError(
            f"{key}.metadata: {settings.metadata}: {error.reason}", f"name a table inside {key}.root, an absolute path, or null"
        ) from error
    preload = ARCHIVE_PRELOAD if relative.endswith((".parquet", ".pq")) else ()
    job = MetadataTableJob(str(folder.resolve()), relative, query)
    answer: dict[str, Any] = run_in_process(table_limits(source.config), read_metadata_table, job, preload)
    if "rows" not in answer:
        problem = str(answer.get("error") or answer.get("reason"))
        problem, fix = (problem.replace("columns.text", "--label"), "--label") if label else (problem, f"{key}.columns")
        raise DataError(f"{key}.metadata: {settings.metadata}: {problem}", f"fix the table or {fix}")
    return answer


def _as_tuple(values: str | list[str] | None) -> tuple[str, ...]:
    return () if values is None else (values,) if isinstance(values, str) else tuple(values)


def _row_filter(rows: Mapping[str, str | list[str]] | None) -> RowFilter | None:
    return None if rows is None else {column: _as_tuple(values) for column, values in rows.items()}
