"""Stage `ingest`: untrusted files in, catalog and normalized media shards out. The only stage that opens raw files.

The parent process hashes bytes and compares signatures. Content is parsed in killable child processes (`worker_pool`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline_steps.core.checksums import record_checksums
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.media_shards import INDEX, write_index, write_shards
from pipeline_steps.core.pool_check import check_pool, check_pool_deps
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import AUDIO, IMAGES, QUARANTINE
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import write_table
from pipeline_steps.ingest.candidates import CandidateFile, RejectedFile
from pipeline_steps.ingest.catalog import catalog_rows, check_id_collisions, check_pools, group_by_content, summarize
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.ingest.decoding.audio import AudioLimits
from pipeline_steps.ingest.decoding.decode import PRELOAD, VERSION, DecodeJob, decode
from pipeline_steps.ingest.decoding.image import ImageLimits
from pipeline_steps.ingest.reason_codes import CODES
from pipeline_steps.ingest.sources.file_walk import inspect_file
from pipeline_steps.ingest.sources.resolve import collect_all_candidates, list_sources
from pipeline_steps.ingest.worker_pool import WorkerLimits, WorkerPool, core_count

__all__ = ["DryRunResult", "IngestConfig", "decoder_pool", "dry_run", "normalize_file", "run"]

log = logging.getLogger(__name__)

STAGE = "ingest"
EXTENSION = {"image": "png", "audio": "flac"}
DECODERS = {"image": ("pillow",), "audio": ("soundfile", "miniaudio", "soxr")}
LIBRARIES = {
    "image": ("pillow", "imagehash", "numpy", "scipy"),
    "audio": ("soundfile", "miniaudio", "soxr", "pyloudnorm", "numpy", "scipy"),
}

JOBS_PER_WORKER = 16
"""Least number of jobs for which another process is started: a start takes as long as some twenty jobs."""

FLUSH_ITEMS = 64
FLUSH_SECONDS = 2.0
FLUSH_BYTES = 64_000_000

_COMMON_FIELDS = [
    pa.field("code", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("payload", pa.binary()),
    pa.field("format", pa.string()),
    pa.field("normalizations", pa.list_(pa.string())),
]
_MEASUREMENTS = {
    "image": (IMAGES, ("width", "height", "num_frames", "phash")),
    "audio": (AUDIO, ("sample_rate", "channels", "duration_s", "lufs", "peak_dbfs", "silence_ratio", "clipping_ratio")),
}
CACHE_SCHEMAS = {
    kind: pa.schema([*_COMMON_FIELDS, *(contract.schema.field(name).with_nullable(True) for name in names)])
    for kind, (contract, names) in _MEASUREMENTS.items()
}


@dataclass(frozen=True)
class DryRunResult:
    """Catalog rows of both kinds, quarantine rows, the balanced report, and the error with which the stage would stop."""

    images: list[dict[str, Any]]
    audio: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    report: StageReport
    error: DataError | None


def run(config: IngestConfig, layout: ProjectPaths) -> StageReport:
    """Ingest all sources into `layout.catalog` and `layout.media`.

    Raises:
        ConfigError: a root or metadata table does not exist, or is no dependency of the stage.
        DataError: an unusable table, a pool that DVC cannot hash, an empty pool, or more failed files than
            `max_failed_fraction`. Nothing is written then.
        ResourceError: decoding processes cannot be started.
    """
    report = StageReport(STAGE)
    if "DVC_STAGE" in os.environ:  # DVC hashes the pool when the stage has ended
        for source in list_sources(config, layout.root):
            check_pool(source.root, f"{source.key}.root")
        check_pool_deps(layout)
    caches = _ShardCaches(config, str(layout.result_cache))
    outcome = _decode_all(config, layout.root, report, caches)
    check_pools(outcome.rows, outcome.rejected, config, report)
    with record_checksums(STAGE, layout.catalog, layout.media):
        _write(config, layout, outcome, caches)
    return report


def dry_run(folder: Path, config: IngestConfig | None = None) -> DryRunResult:
    """Decode all files below `folder` as `run` does, without reading the cache or writing anything.

    Args:
        folder: any folder; with `config.pools` the project folder, to which their roots are relative.
        config: limits and, if it names one, a metadata table inside `folder`; by default the default limits and all files.
    """
    config = config or IngestConfig()
    if not config.pools:
        folder, config = folder.parent, config.model_copy(update={"root": folder.name or "."})
    report = StageReport(STAGE)
    outcome = _decode_all(config, folder, report, _ShardCaches(config, None))
    stops = None
    try:
        check_pools(outcome.rows, outcome.rejected, config, report)
    except DataError as error:
        stops = error
    return DryRunResult(outcome.rows["image"], outcome.rows["audio"], [item.row() for item in outcome.rejected], report, stops)


def decoder_pool(config: IngestConfig) -> WorkerPool:
    """One decoding process with the limits of the stage, for repeated calls of `normalize_file`."""
    return WorkerPool(_worker_limits(config)._replace(workers=1), decode, PRELOAD)


def normalize_file(
    path: Path, config: IngestConfig | None = None, workers: WorkerPool | None = None
) -> tuple[str, str, bytes, dict[str, Any]]:
    """Decode one file in a child process and return (id, kind, normalized payload, measurements).

    The payload has the format of the media shards: PNG, or mono 48 kHz FLAC.

    Args:
        path: any file.
        config: limits; by default the default limits.
        workers: an open `decoder_pool`; None starts a process for this file.

    Raises:
        DataError: the file is rejected; the reason contains the code.
    """
    config = config or IngestConfig()
    path = Path(os.path.realpath(path))  # the user named the file, so its links may leave any folder
    file = inspect_file(path.parent, path.name, None, config.image.max_file_bytes, walked=False)
    if isinstance(file, str):
        raise DataError(f"{path}: not a media file", "choose another file")
    if isinstance(file, RejectedFile):
        raise DataError(f"{path}: {file.code}: {file.reason}", "choose another file")
    with nullcontext(workers) if workers else decoder_pool(config) as pool:
        result = pool.run(build_decode_job(config, file))
    if result["code"]:
        raise DataError(f"{path}: {result['code']}: {result['reason']}", "choose another file")
    return file.item_id, file.kind, result.pop("payload"), result


@dataclass
class _IngestOutcome:
    """Files by id, catalog rows by kind, and rejected files."""

    items: dict[str, list[CandidateFile]]
    rows: dict[str, list[dict[str, Any]]]
    rejected: list[RejectedFile]


class _ShardCaches:
    """Result caches, one per kind and shard prefix, with buffered writes. A dry run (`url` None) reads and writes nothing.

    Separate caches let `_write` load the payloads of one shard at a time.
    """

    def __init__(self, config: IngestConfig, url: str | None) -> None:
        self._url = url
        self._digits = config.shard_prefix_digits
        self._fingerprints = {kind: f"{kind}-{fingerprint(_fingerprint_parts(config, kind))}" for kind in EXTENSION}
        self._buffer: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        self._items = self._bytes = 0
        self._since = 0.0

    def partition(self, items: Mapping[str, list[CandidateFile]]) -> dict[tuple[str, str], list[str]]:
        """(kind, prefix) -> ids, all sorted."""
        shards: dict[tuple[str, str], list[str]] = {}
        for kind, item in sorted((files[0].kind, item) for item, files in items.items()):
            shards.setdefault((kind, item[: self._digits]), []).append(item)
        return shards

    def _open(self, kind: str, prefix: str) -> ResultCache:
        return ResultCache(str(self._url), STAGE, f"{self._fingerprints[kind]}/{prefix}", CACHE_SCHEMAS[kind])

    def load(self, items: Mapping[str, list[CandidateFile]]) -> dict[str, dict[str, Any]]:
        """Cached results without their payloads."""
        results: dict[str, dict[str, Any]] = {}
        for (kind, prefix), members in self.partition(items if self._url is not None else {}).items():
            columns = [name for name in CACHE_SCHEMAS[kind].names if name != "payload"]
            results.update(self._open(kind, prefix).load(members, columns))
        return results

    def load_payloads(self, kind: str, prefix: str, members: list[str]) -> dict[str, bytes]:
        """Payloads of a shard's items."""
        cached = self._open(kind, prefix).load(members)
        if missing := [item for item in members if item not in cached]:
            raise IntegrityError(f"result cache: no payload of {missing[0]}", "run the stage again to decode it")
        return {item: cached[item]["payload"] for item in members}

    def add(self, kind: str, item: str, result: dict[str, Any]) -> None:
        """Buffer a result and write the buffer if it is large or old. Results with a retryable code are not cached."""
        if self._url is None or (result["code"] and CODES[result["code"]].retryable):
            return
        if not self._items:
            self._since = time.monotonic()
        self._buffer.setdefault((kind, item[: self._digits]), {})[item] = result
        self._items += 1
        self._bytes += len(result.get("payload") or b"")
        late = time.monotonic() - self._since > FLUSH_SECONDS
        if late or self._items >= FLUSH_ITEMS or self._bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the buffered results."""
        for shard, rows in self._buffer.items():
            self._open(*shard).append(rows)
        self._buffer.clear()
        self._items = self._bytes = 0


def _fingerprint_parts(config: IngestConfig, kind: str) -> dict[str, Any]:
    """All inputs of a decoding result of a kind other than the bytes."""
    libraries = {name: version(name) for name in LIBRARIES[kind]}
    return {"version": VERSION, "libraries": libraries, "parameters": _decode_limits(config, kind)._asdict()}


def _decode_limits(config: IngestConfig, kind: str) -> ImageLimits | AudioLimits:
    image, audio = config.image, config.audio
    if kind == "audio":
        return AudioLimits(audio.min_seconds, audio.max_seconds, audio.min_lufs)
    return ImageLimits(image.max_side, image.min_side, image.max_aspect, int(image.max_megapixels * 1_000_000), image.animated)


def _worker_limits(config: IngestConfig, jobs: int = 1) -> WorkerLimits:
    """Limits of the decoding processes. There are no more processes than `jobs` can use."""
    decoder = config.decoder
    count = min(decoder.workers or core_count(), max(1, -(-jobs // JOBS_PER_WORKER)))
    return WorkerLimits(count, decoder.timeout_seconds, decoder.memory_mb * 1_000_000)


def build_decode_job(config: IngestConfig, file: CandidateFile) -> DecodeJob:
    """Decoding job of a file."""
    limits = _decode_limits(config, file.kind)
    return DecodeJob(file.root, file.relative, file.sha256, file.format, limits, file.member)


def _decoder_versions(kind: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in DECODERS.get(kind, ()))


def _decode_all(config: IngestConfig, project: Path, report: StageReport, caches: _ShardCaches) -> _IngestOutcome:
    """Discover, hash and decode all files, and fill the report. Cached results are reused."""
    found = collect_all_candidates(config, project)
    check_id_collisions(found.files)
    items = group_by_content(found.files)
    results = _results(config, items, report, caches)
    rejected = list(found.rejected)
    for item, files in items.items():
        code, reason = results[item]["code"], results[item]["reason"]
        if code:
            decoder = _decoder_versions(files[0].kind)
            rejected += [RejectedFile(file.path, file.kind, code, reason, file.bytes, item, decoder) for file in files]
    rejected.sort(key=lambda item: (item.kind, item.path, item.item_id))
    rows = {}
    for kind, phash_distance in (("image", config.image.phash_distance), ("audio", -1)):
        accepted = {item: files for item, files in items.items() if files[0].kind == kind and not results[item]["code"]}
        rows[kind] = catalog_rows(kind, accepted, results, phash_distance)
    report.n_in = found.count
    report.n_ok = sum(len(row["sources"]) for kind in rows for row in rows[kind])
    report.n_abstained = sum(item.abstained for item in rejected)
    report.n_quarantined = len(rejected) - report.n_abstained
    report.check_balance()
    report.metrics.update(summarize(rows, rejected))
    report.metrics.update(skipped_files=dict(sorted(found.skipped_files.items())), filtered_rows=found.filtered_rows)
    if found.layouts:
        report.metrics["layouts"] = found.layouts
    return _IngestOutcome(items, rows, rejected)


def _results(
    config: IngestConfig, items: Mapping[str, list[CandidateFile]], report: StageReport, caches: _ShardCaches
) -> dict[str, dict[str, Any]]:
    """Decoding result of each item without its payload. New results are cached as they arrive, so a killed run can resume."""
    results = caches.load(items)
    report.cache_hits = len(results)
    order = sorted(items.keys() - results.keys(), key=lambda item: (items[item][0].kind, _read_order(items[item][0]), item))
    report.cache_misses = len(order)
    jobs = ((item, build_decode_job(config, items[item][0])) for item in order)
    try:
        with WorkerPool(_worker_limits(config, len(order)), decode, PRELOAD) as workers:
            for item, result in _progress(workers.map(jobs), len(order)):
                caches.add(items[item][0].kind, item, result)
                results[item] = {name: value for name, value in result.items() if name != "payload"}
    finally:  # also when interrupted
        caches.flush()
    return results


def _read_order(file: CandidateFile) -> tuple[str, int, int]:
    """Sort key that keeps the rows of a table together, so that each row group is read once."""
    return (f"{file.root}/{file.relative}", file.member.group, file.member.row) if file.member else ("", 0, 0)


def _progress(results: Iterable[Any], total: int) -> Iterator[Any]:
    """Yield the results, with a progress bar on a terminal and a log line per hundred elsewhere."""
    if not sys.stderr.isatty() or not total:
        for number, result in enumerate(results, 1):
            if number % 100 == 0 or number == total:
                log.info("decoded %d of %d new files", number, total)
            yield result
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, "decoding", total=total, console=Console(stderr=True), transient=True)


def _write(config: IngestConfig, layout: ProjectPaths, outcome: _IngestOutcome, caches: _ShardCaches) -> None:
    """Write shards, tables, and the index last: readers treat shards without an index as incomplete."""
    (layout.media / INDEX).unlink(missing_ok=True)
    index: list[dict[str, Any]] = []
    for kind, extension in EXTENSION.items():
        accepted = {row[f"{kind}_id"]: outcome.items[row[f"{kind}_id"]] for row in outcome.rows[kind]}
        for (_, prefix), members in caches.partition(accepted).items():
            payloads = caches.load_payloads(kind, prefix, members)
            index += write_shards(layout.media, kind, payloads, extension, config.shard_prefix_digits)
    shards = {row["shard"] for row in index}
    for path in layout.media.glob("*.tar"):
        if path.name not in shards:
            path.unlink()
    write_table(layout.catalog / "images.parquet", IMAGES, outcome.rows["image"])
    write_table(layout.catalog / "audio.parquet", AUDIO, outcome.rows["audio"])
    write_table(layout.catalog / "quarantine.parquet", QUARANTINE, [item.row() for item in outcome.rejected])
    write_index(layout.media, index)
