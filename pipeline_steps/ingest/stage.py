"""Stage `ingest`: untrusted files in, catalog and normalised media shards out. The only stage that opens raw files.

The parent hashes bytes and compares signatures; whatever parses content runs in killable child processes (`workers`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.media_shards import INDEX, write_index, write_shards
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import AUDIO, IMAGES, QUARANTINE
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import write_table
from pipeline_steps.ingest.catalog import (
    CandidateFile,
    RejectedFile,
    catalog_rows,
    check_identity,
    check_pools,
    crossing_groups,
    group_by_content,
)
from pipeline_steps.ingest.config import IngestConfig
from pipeline_steps.ingest.decoding.audio import AudioLimits
from pipeline_steps.ingest.decoding.decode import PRELOAD, VERSION, DecodeJob, decode
from pipeline_steps.ingest.decoding.image import ImageLimits
from pipeline_steps.ingest.reason_codes import CODES
from pipeline_steps.ingest.sources.file_walk import DiscoveryResult, inspect_file
from pipeline_steps.ingest.sources.resolve import collect_candidates
from pipeline_steps.ingest.takedowns import apply_takedowns
from pipeline_steps.ingest.worker_pool import WorkerLimits, WorkerPool, core_count

__all__ = ["DryRunResult", "IngestConfig", "check", "normalise_file", "run"]

log = logging.getLogger(__name__)

STAGE = "ingest"
EXTENSION = {"image": "png", "audio": "flac"}
CONTRACT = {"image": IMAGES, "audio": AUDIO}
DECODERS = {"image": ("pillow",), "audio": ("soundfile", "soxr")}
LIBRARIES = {"image": ("pillow", "imagehash", "numpy", "scipy"), "audio": ("soundfile", "soxr", "pyloudnorm", "numpy", "scipy")}

JOBS_PER_START = 16
"""A process starts in the time in which it decodes some twenty files."""

FLUSH_ITEMS = 64
FLUSH_SECONDS = 2.0
FLUSH_BYTES = 64_000_000

_COMMON = [
    pa.field("code", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("payload", pa.binary()),
    pa.field("format", pa.string()),
    pa.field("normalizations", pa.list_(pa.string())),
]
_MEASURED = {
    "image": ("width", "height", "num_frames", "phash"),
    "audio": ("sample_rate", "channels", "duration_s", "lufs", "peak_dbfs", "silence_ratio", "clipping_ratio"),
}
MEMO_SCHEMA = {
    kind: pa.schema([*_COMMON, *(CONTRACT[kind].schema.field(name).with_nullable(True) for name in names)])
    for kind, names in _MEASURED.items()
}


@dataclass(frozen=True)
class DryRunResult:
    """What `check` found: catalog rows of both kinds, quarantine rows, and the balanced report."""

    images: list[dict[str, Any]]
    audio: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    report: StageReport


def run(config: IngestConfig, layout: ProjectPaths) -> StageReport:
    """Ingest `config.root` into `layout.catalog` and `layout.media`.

    Raises:
        ConfigError: the root or the metadata table is not there.
        DataError: an unusable table, an empty pool, or more bad files than `max_failed_fraction`; nothing is written then.
        ResourceError: decoding processes cannot be started.
    """
    report = StageReport(STAGE)
    memos = _ShardCaches(config, str(layout.result_cache))
    outcome = _decode_all(config, layout.root / config.root, report, memos)
    check_pools(outcome.rows, report.n_in, outcome.refused, config.max_failed_fraction)
    _write(config, layout, outcome, memos)
    return report


def check(folder: Path, config: IngestConfig | None = None) -> DryRunResult:
    """Decode everything below `folder` exactly as `run` would, and write nothing.

    Args:
        folder: any folder tree.
        config: limits and, if it names one, a metadata table inside `folder`; default limits and a plain walk otherwise.
    """
    config = config or IngestConfig(metadata=None, pool=None, holdout=None)
    report = StageReport(STAGE)
    outcome = _decode_all(config, folder, report, None)
    quarantine = [item.row() for item in outcome.refused]
    return DryRunResult(outcome.rows["image"], outcome.rows["audio"], quarantine, report)


def normalise_file(path: Path, config: IngestConfig | None = None) -> tuple[str, str, bytes, dict[str, Any]]:
    """One user-given file -> (id, kind, normalised payload, measurements), decoded in a child process.

    The payload is what `core.media` stores: PNG, or mono 48 kHz FLAC.

    Raises:
        DataError: the file is not taken; the reason holds the code.
    """
    config = config or IngestConfig()
    path = Path(os.path.realpath(path))  # a person named it, so links may lead anywhere
    file = inspect_file(path.parent, path.name, None, config.picture.max_file_mb * 1e6, walked=False)
    if isinstance(file, str):
        raise DataError(f"{path}: not a media file", "choose another file")
    if isinstance(file, RejectedFile):
        raise DataError(f"{path}: {file.code}: {file.reason}", "choose another file")
    with _workers(config, 1) as workers:
        _, result = next(iter(workers.map([(file.item, make_job(config, path.parent, file))])))
    if result["code"]:
        raise DataError(f"{path}: {result['code']}: {result['reason']}", "choose another file")
    return file.item, file.kind, result.pop("payload"), result


@dataclass
class _IngestOutcome:
    items: dict[str, list[CandidateFile]]
    rows: dict[str, list[dict[str, Any]]]
    refused: list[RejectedFile]


class _ShardCaches:
    """One memo per kind and shard bucket, so that writing a shard loads that bucket's payloads alone."""

    def __init__(self, config: IngestConfig, url: str) -> None:
        self._url = url
        self._prefix = config.shard_prefix
        self._fingerprints = {kind: f"{kind}-{fingerprint(_description(config, kind))}" for kind in EXTENSION}

    def bucket(self, item: str) -> str:
        return item[: self._prefix]

    def buckets(self, items: Mapping[str, list[CandidateFile]]) -> dict[tuple[str, str], list[str]]:
        """(kind, bucket) -> ids, all sorted."""
        found: dict[tuple[str, str], list[str]] = {}
        for item in sorted(items, key=lambda item: (items[item][0].kind, item)):
            found.setdefault((items[item][0].kind, self.bucket(item)), []).append(item)
        return found

    def of(self, kind: str, bucket: str) -> ResultCache:
        return ResultCache(self._url, STAGE, f"{self._fingerprints[kind]}/{bucket}", MEMO_SCHEMA[kind])


def _description(config: IngestConfig, kind: str) -> dict[str, Any]:
    """Everything but the bytes that shapes a decoding result of a kind."""
    parameters = _picture_limits(config)._asdict() if kind == "image" else _sound_limits(config)._asdict()
    return {"version": VERSION, "libraries": {name: version(name) for name in LIBRARIES[kind]}, "parameters": parameters}


def _picture_limits(config: IngestConfig) -> ImageLimits:
    picture = config.picture
    pixels = int(picture.max_megapixels * 1_000_000)
    return ImageLimits(picture.side, picture.min_side, picture.max_aspect, pixels, picture.animated)


def _sound_limits(config: IngestConfig) -> AudioLimits:
    sound = config.sound
    return AudioLimits(sound.min_seconds, sound.max_seconds, sound.silence_lufs)


def _workers(config: IngestConfig, jobs: int) -> WorkerPool:
    """Decoding processes: no more than pay for their start with `jobs` to do."""
    count = min(config.limits.workers or core_count(), max(1, -(-jobs // JOBS_PER_START)))
    limits = config.limits
    return WorkerPool(WorkerLimits(count, limits.timeout_seconds, limits.memory_mb * 1_000_000), decode, PRELOAD)


def make_job(config: IngestConfig, root: Path, file: CandidateFile) -> DecodeJob:
    """What a decoding process needs to know of one file below `root`."""
    limits = (_picture_limits(config), _sound_limits(config))
    return DecodeJob(str(root.resolve()), file.relative, file.sha256, file.kind, file.format, *limits, file.member)


def _decoder_name(kind: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in DECODERS.get(kind, ()))


def _decode_all(config: IngestConfig, root: Path, report: StageReport, memos: _ShardCaches | None) -> _IngestOutcome:
    """Find, hash, decode and balance; fills `report`. Results come from `memos` where they are known."""
    if not root.is_dir():
        raise ConfigError(f"ingest.root: {root} is not a folder", "name the folder that holds your pictures and sounds")
    found, ignored, layouts = collect_candidates(config, root)
    apply_takedowns(root, found)
    check_identity(found.files)
    items = group_by_content(found.files)
    results = _results(root, config, items, report, memos)
    refused = list(found.refused)
    for item, files in items.items():
        result = results[item]
        if result["code"]:
            name = _decoder_name(files[0].kind)
            refused += [
                RejectedFile(file.shown, file.kind, result["code"], result["reason"], file.bytes, item, name) for file in files
            ]
    refused.sort(key=lambda item: (item.kind, item.shown, item.item))
    rows = {}
    for kind, distance in (("image", config.picture.near_duplicate_bits), ("audio", -1)):
        accepted = {item: files for item, files in items.items() if files[0].kind == kind and not results[item]["code"]}
        rows[kind] = catalog_rows(kind, accepted, results, distance)
    report.n_in = found.count
    report.n_ok = sum(len(row["sources"]) for kind in rows for row in rows[kind])
    report.n_abstained = sum(item.abstained for item in refused)
    report.n_quarantined = len(refused) - report.n_abstained
    report.check_balance()
    report.metrics.update(_metrics(rows, refused, found), rows_ignored=ignored)
    if layouts:
        report.metrics["layouts"] = layouts
    return _IngestOutcome(items, rows, refused)


def _metrics(rows: Mapping[str, list[dict[str, Any]]], refused: list[RejectedFile], found: DiscoveryResult) -> dict[str, Any]:
    both = [row for kind in rows for row in rows[kind]]
    metrics: dict[str, Any] = {}
    for kind, name in (("image", "images"), ("audio", "sounds")):
        metrics[name] = {
            "items": len(rows[kind]),
            "pool": sum(not row["holdout"] for row in rows[kind]),
            "holdout": sum(row["holdout"] for row in rows[kind]),
            "groups": len({row["group_id"] for row in rows[kind]}),
            "pool_items_near_holdout": crossing_groups(rows[kind]),
        }
    metrics["duplicate_files"] = sum(len(row["sources"]) - 1 for row in both)
    metrics["codes"] = dict(sorted(Counter(item.code for item in refused).items()))
    metrics["normalizations"] = dict(sorted(Counter(code for row in both for code in row["normalizations"]).items()))
    metrics["passed_over"] = dict(sorted(found.passed_over.items()))
    metrics["audio_hours"] = round(sum(row["duration_s"] for row in rows["audio"]) / 3600, 4)
    return metrics


def _results(
    root: Path, config: IngestConfig, items: Mapping[str, list[CandidateFile]], report: StageReport, memos: _ShardCaches | None
) -> dict[str, dict[str, Any]]:
    """Result of each item without its payload. New ones go to the memo as they come, so that a killed run resumes."""
    results: dict[str, dict[str, Any]] = {}
    if memos is not None:
        for (kind, bucket), members in memos.buckets(items).items():
            columns = [name for name in MEMO_SCHEMA[kind].names if name != "payload"]
            results.update(memos.of(kind, bucket).load(members, columns))
    report.reused = len(results)
    order = sorted(items.keys() - results.keys(), key=lambda item: (items[item][0].kind, _place(items[item][0]), item))
    report.computed = len(order)
    pending = _CacheWriter(memos)
    jobs = ((item, make_job(config, root, items[item][0])) for item in order)
    try:
        with _workers(config, len(order)) as workers:
            for item, result in _progress(workers.map(jobs), len(order)):
                pending.add(items[item][0].kind, item, result)
                results[item] = {name: value for name, value in result.items() if name != "payload"}
    finally:  # also when interrupted
        pending.flush()
    return results


def _place(file: CandidateFile) -> tuple[str, int, int]:
    """Neighbours in a table are decoded one after the other, so that a row group is read once; loose files go by id."""
    return (file.relative, file.member.group, file.member.row) if file.member else ("", 0, 0)


class _CacheWriter:
    """Results on their way to the memo. Those that another try may change are not kept."""

    def __init__(self, memos: _ShardCaches | None) -> None:
        self._memos = memos
        self._rows: dict[str, dict[str, dict[str, Any]]] = {}
        self._items = self._bytes = 0
        self._since = 0.0

    def add(self, kind: str, item: str, result: dict[str, Any]) -> None:
        if self._memos is None or (result["code"] and CODES[result["code"]].retryable):
            return
        if not self._items:
            self._since = time.monotonic()
        self._rows.setdefault(kind, {})[item] = result
        self._items += 1
        self._bytes += len(result.get("payload") or b"")
        late = time.monotonic() - self._since > FLUSH_SECONDS
        if late or self._items >= FLUSH_ITEMS or self._bytes >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._memos is not None:
            for kind, rows in self._rows.items():
                for bucket in sorted({self._memos.bucket(item) for item in rows}):
                    mine = {item: row for item, row in rows.items() if self._memos.bucket(item) == bucket}
                    self._memos.of(kind, bucket).append(mine)
        self._rows.clear()
        self._items = self._bytes = 0


def _progress(results: Iterable[Any], total: int) -> Iterator[Any]:
    """The same results, with a bar on the terminal where there is one, else a line for every hundred."""
    if not sys.stderr.isatty() or not total:
        for number, result in enumerate(results, 1):
            if number % 100 == 0 or number == total:
                log.info("decoded %d of %d new files", number, total)
            yield result
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(results, "decoding", total=total, console=Console(stderr=True), transient=True)


def _write(config: IngestConfig, layout: ProjectPaths, outcome: _IngestOutcome, memos: _ShardCaches) -> None:
    """Shards, tables, and the index last: without it no reader takes the shards for complete."""
    (layout.media / INDEX).unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    for kind, extension in EXTENSION.items():
        accepted = {row[f"{kind}_id"]: outcome.items[row[f"{kind}_id"]] for row in outcome.rows[kind]}
        for (_, bucket), members in memos.buckets(accepted).items():
            known = memos.of(kind, bucket).load(members)
            lost = [item for item in members if item not in known]
            if lost:
                raise IntegrityError(f"the memo lost the payload of {lost[0]}", "run the stage again: it will be decoded anew")
            payloads = {item: known[item]["payload"] for item in members}
            rows += write_shards(layout.media, kind, payloads, extension, config.shard_prefix)
    shards = {row["shard"] for row in rows}
    for stale in layout.media.glob("*.tar"):
        if stale.name not in shards:
            stale.unlink()
    write_table(layout.catalog / "images.parquet", IMAGES, outcome.rows["image"])
    write_table(layout.catalog / "audio.parquet", AUDIO, outcome.rows["audio"])
    write_table(layout.catalog / "quarantine.parquet", QUARANTINE, [item.row() for item in outcome.refused])
    write_index(layout.media, rows)
