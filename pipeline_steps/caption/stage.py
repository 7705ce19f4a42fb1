"""Stage `caption`: list the sound events of every image, or the reason to abstain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline_steps.caption.captioners.base import (
    CAPTIONERS,
    Captioner,
    CaptionFailure,
    CaptionOptions,
    CaptionResult,
    EventSelection,
)
from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.caption.text_cleaning import clean_events
from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.checksums import record_checksums
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.executors.base import Result
from pipeline_steps.core.executors.run import run_items
from pipeline_steps.core.gpu_memory import gpu_memory_guard
from pipeline_steps.core.hashing import fingerprint, text_id
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import ABSTAINED, EVENTS, IMAGES, QUARANTINE
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table, write_table


def build_captioner(config: CaptionConfig, layout: ProjectPaths) -> Captioner[Any]:
    """Construct the captioner of a configuration; loads no weights.

    Raises:
        ConfigError: no captioner has that name, or it cannot be used with this configuration.
    """
    implementation = CAPTIONERS.get(config.captioner)
    selection = EventSelection(config.max_events, config.min_confidence, config.min_relative_weight)
    options = CaptionOptions(selection, config.prompt, config.batch_size, layout.assets, layout.root, config.use_text)
    return implementation(config.implementation_config(config.captioner) or implementation.config_class(), options)


def run(config: CaptionConfig, layout: ProjectPaths) -> StageReport:
    """Caption every image of the catalog.

    Raises:
        DataError: the catalog has no image, more than `max_failed_fraction` of them failed, or the first ones all failed.
        ConfigError, IntegrityError: a model cannot be used or must not be loaded.
        ServiceError: a required server or hub is unavailable; finished images are in the cache.
    """
    report = StageReport("caption")
    catalog = read_table(layout.catalog / "images.parquet", IMAGES).to_pylist()
    if not catalog:
        raise DataError(
            f"{layout.catalog / 'images.parquet'}: ingest accepted no image; at least 1 is required",
            "list the reasons: sonify quarantine list",
        )
    processor = CaptionProcessor(config, layout)
    if processor.captioner.reads_text and not any(row["text"] for row in catalog):
        raise DataError(
            f"{layout.catalog / 'images.parquet'}: no image has words, which captioner {config.captioner!r} reads",
            "set ingest.columns.text, or change caption.captioner or caption.use_text",
        )
    keys = [processor.key(row) for row in catalog]
    rows = processor.cache.load(keys)
    report.cache_hits = len(rows)
    new, limit = [key for key in keys if key not in rows], config.failure_limit(len(keys), len(rows))
    done = run_items(processor, new, config.batch_size, config.executor, config.ray, limit)
    computed = {**done.rows, **processor.cache.load(done.cached_ids)}
    report.cache_misses = len(computed)
    predictions = {image_of(key): processor.captioner.from_row(row) for key, row in {**rows, **computed}.items()}
    failures = {image_of(key): CaptionFailure(*failure) for key, failure in done.failed.items()}
    _write(config, layout, report, catalog, predictions, failures, processor.captioner)
    return report


class CaptionProcessor:
    """Item processor: cache keys of images -> cache rows. It runs in the stage's process or in Ray actors."""

    def __init__(self, config: CaptionConfig, layout: ProjectPaths) -> None:
        self._settings = (config, layout)
        self.captioner = build_captioner(config, layout)
        url = config.cache_dir or str(layout.result_cache)
        self.cache = ResultCache(url, "caption", fingerprint(self.describe()), self.captioner.schema)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_processor, (*self._settings, self.cache)

    def describe(self) -> dict[str, Any]:
        return self.captioner.describe_prediction()

    def key(self, row: Mapping[str, Any]) -> str:
        """Cache key of a catalog row: the image id, and the id of the words if the captioner reads them."""
        words = row["text"] if self.captioner.reads_text else None
        return f"{row['image_id']}.{text_id(words)}" if words else str(row["image_id"])

    def load(self) -> None:
        with gpu_memory_guard("caption.captioner", "choose a smaller model or a larger GPU"):
            self.captioner.load()
        layout = self._settings[1]
        self._media = MediaShardReader(layout.media)
        self._words: dict[str, str] | None = None
        if self.captioner.reads_text:
            table = read_table(layout.catalog / "images.parquet", IMAGES).select(["image_id", "text"])
            self._words = {self.key(row): row["text"] for row in table.to_pylist() if row["text"]}

    def results(self, ids: Sequence[str]) -> Iterator[tuple[str, Result]]:
        empty = np.zeros((0, 0, 3), np.uint8) if self.captioner.text_input == "required" else None
        images = ((key, self._media.image(image_of(key)) if empty is None else empty) for key in ids)
        stream = self.captioner.stream(images) if self._words is None else self.captioner.stream(images, self._words)
        for key, result in stream:
            yield key, result if isinstance(result, CaptionFailure) else self.captioner.to_row(result)


def image_of(key: str) -> str:
    """Image id of a cache key."""
    return key.partition(".")[0]


def _restore_processor(config: CaptionConfig, layout: ProjectPaths, cache: ResultCache) -> CaptionProcessor:
    """Unpickle hook: rebuild the processor in a worker, with the cache of the driver.

    The worker's own fingerprint may differ, for example in the data type that a device selects.
    """
    processor = CaptionProcessor(config, layout)
    processor.cache = cache
    return processor


def _write(
    config: CaptionConfig,
    layout: ProjectPaths,
    report: StageReport,
    catalog: list[dict[str, Any]],
    predictions: Mapping[str, Any],
    failures: Mapping[str, CaptionFailure],
    captioner: Captioner[Any],
) -> None:
    """Write the tables and complete the report.

    Raises:
        DataError: more than `max_failed_fraction` of the images failed.
    """
    events: list[dict[str, Any]] = []
    abstained: list[dict[str, Any]] = []
    quarantined: list[dict[str, Any]] = []
    for row in catalog:
        image_id = row["image_id"]
        report.n_in += 1
        if image_id in failures:
            quarantined.append(_quarantine_row(row, failures[image_id], config.captioner))
            continue
        caption = captioner.caption(predictions[image_id])
        cleaned = clean_events(caption.events, config.max_phrase_chars)
        if not cleaned:
            abstained.append(_abstention_row(image_id, caption))
            continue
        report.n_ok += 1
        for rank, event in enumerate(cleaned):
            events.append(
                {
                    "image_id": image_id,
                    "rank": rank,
                    "text_id": text_id(event.phrase),
                    "phrase": event.phrase,
                    "sound_source": event.sound_source,
                    "visible": event.visible,
                    "salience": event.salience,
                    "confidence": event.confidence,
                    "distance": event.distance,
                    "space": caption.space,
                }
            )
    report.n_abstained, report.n_quarantined = len(abstained), len(quarantined)
    if quarantined:
        first = f"first: {quarantined[0]['path']}: {quarantined[0]['reason']}"
        report.check_failures(config.max_failed_fraction, "images", first, "fix the captioner")
    codes = [row["code"] for row in abstained]
    families, caption_fingerprint = list(captioner.families), fingerprint(captioner.describe())
    report.metrics = {
        "events": len(events),
        "unique_texts": len({row["text_id"] for row in events}),
        "abstained": {code: codes.count(code) for code in sorted(set(codes))},
        "families": families,
        "fingerprint": caption_fingerprint,
    }
    meta = {
        "captioner": config.captioner,
        "families": families,  # evaluation rejects judges of these families
        "families_complete": captioner.families_complete,
        "fingerprint": caption_fingerprint,
    }
    with record_checksums("caption", layout.captions):
        write_table(layout.captions / "events.parquet", EVENTS, events)
        write_table(layout.captions / "quarantine.parquet", QUARANTINE, quarantined)
        write_table(layout.captions / "abstained.parquet", ABSTAINED, abstained)
        write_json(layout.captions / "meta.json", meta)


def _abstention_row(image_id: str, caption: CaptionResult) -> dict[str, Any]:
    code, reason = (caption.code, caption.reason) if caption.code else ("EMPTY", "no phrase was left after cleaning")
    return {"image_id": image_id, "stage": "caption", "code": code, "reason": reason, "score": caption.score}


def _quarantine_row(row: Mapping[str, Any], failure: CaptionFailure, captioner: str) -> dict[str, Any]:
    return {
        "item_id": row["image_id"],
        "kind": "image",
        "path": row["path"],
        "bytes": row["bytes"],
        "stage": "caption",
        "code": failure.code,
        "reason": failure.reason[:500],
        "decoder": captioner,
        "action": "dropped",
        "retryable": True,
    }
