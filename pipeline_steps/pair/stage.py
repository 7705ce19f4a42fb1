"""Stage `pair`: assign one clip to each image, or record why an image has none."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline_steps import __version__, tracking
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.atomic import write_json, write_text
from pipeline_steps.core.checksums import record_checksums, verified_sha256
from pipeline_steps.core.errors import DataError
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.core.presets import flatten
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import ABSTAINED, AUDIO, AUDIO_IDS, EVENTS, IMAGES, NEIGHBORS, PAIRS, QUARANTINE, TEXT_IDS
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.pair.candidates import null_threshold
from pipeline_steps.pair.config import PairConfig
from pipeline_steps.pair.eligibility import Vectors
from pipeline_steps.pair.pairing import PairingInputs, PairingResult, pair_images_with_audio
from pipeline_steps.pair.release.dataset_card import croissant, render_card
from pipeline_steps.pair.split_leakage import find_leaks, train_phrase_overlap
from pipeline_steps.pair.splits import SPLITS
from pipeline_steps.tracking.lineage.dvc_digests import hash_path

__all__ = ["PairConfig", "run"]

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image_id", "group_id", "holdout", "license", "phash")
AUDIO_COLUMNS = ("audio_id", "group_id", "holdout", "license", "lufs")
"""Columns of the catalog that pairing reads; all columns of a million rows would take gigabytes."""
MIN_TEST_PAIRS = 2
"""Test pairs below which the stage `evaluate` has no negatives and measures nothing."""


def run(config: PairConfig, layout: ProjectPaths) -> StageReport:
    """Pair the pool, and track the data set as a run of its own."""
    inputs = [layout.catalog, layout.captions, layout.embeddings, layout.retrieval]
    with tracking.run("pair", layout, config, inputs=inputs) as tracker:
        report = build_pairs(config, layout)
        numbers = {
            **report.metrics["assignment"],
            "pairs": report.n_ok,
            "abstained": report.n_abstained,
            **report.metrics["splits"],
        }
        tracker.log_metrics({f"pair/{name}": float(value) for name, value in numbers.items()})
        digest = hash_path(layout.pairs)
        tracker.log_input("data/pairs", digest, "data/pairs", "pair", {"pairs": report.n_ok, **report.metrics["splits"]})
        for name in ("README.md", "croissant.json", "stats.json"):
            tracker.log_artifact(layout.pairs / name, folder="dataset")
    return report


def build_pairs(config: PairConfig, layout: ProjectPaths) -> StageReport:
    """Pair pool images with pool audio. The counts of the report are over images that are not held out.

    Raises:
        DataError: there is nothing to pair, tables do not belong together, or there is leakage between the splits.
    """
    report = StageReport("pair")
    images = read_table(layout.catalog / "images.parquet", IMAGES).select(list(IMAGE_COLUMNS)).to_pylist()
    audio = read_table(layout.catalog / "audio.parquet", AUDIO).select(list(AUDIO_COLUMNS)).to_pylist()
    pool = {row["image_id"] for row in images if not row["holdout"]}
    if not pool:
        raise DataError(
            "no image may be paired: all images are quarantined or held out", "see the reasons: sonify quarantine list"
        )
    upstream = _upstream_abstentions(layout, pool)
    vectors, z_threshold = _embeddings(layout, config, {row["audio_id"] for row in audio if not row["holdout"]})
    events = read_table(layout.captions / "events.parquet", EVENTS)
    neighbors = read_table(layout.retrieval / "neighbors.parquet", NEIGHBORS)
    result = pair_images_with_audio(PairingInputs(images, audio, events, neighbors, vectors, z_threshold), config)
    _fill_report(report, pool, upstream, result)
    if not result.pairs:
        codes = Counter({**result.metrics["abstained_by_code"]}) + Counter(code for code, _ in upstream.values())
        raise DataError(f"no pair was made: {len(pool)} images, {dict(codes)}", "lower pair.null_quantile, or see the captions")
    leaks = find_leaks(
        result.pairs,
        {row["image_id"]: row["phash"] for row in images},
        vectors,
        _held_out(images, "image_id") | _held_out(audio, "audio_id"),
        config.image_phash_distance,
        config.audio_duplicate_cosine,
    )
    leaks.refuse()
    counts = Counter(pair["split"] for pair in result.pairs)
    stats: dict[str, Any] = {
        **result.metrics,
        "pictures": report.n_in,
        "pairs": report.n_ok,
        "abstained": report.n_abstained,
        "quarantined": report.n_quarantined,
        "abstained_all": dict(
            sorted((Counter(row["code"] for row in result.abstained) + Counter(code for code, _ in upstream.values())).items())
        ),
        "splits": {split: counts.get(split, 0) for split in SPLITS},
        "empty_splits": [split for split in SPLITS if not counts.get(split)],
        "leaks": leaks.counts(),
        "test_phrase_overlap": round(train_phrase_overlap(result.pairs, "test"), 6),
    }
    report.metrics = stats
    if stats["empty_splits"]:
        log.warning("the pool is too small for all splits: no pair in %s", ", ".join(stats["empty_splits"]))
    if counts["test"] < MIN_TEST_PAIRS:
        log.warning(
            "too few test pairs to judge a model: %d of %d; unless evaluate.ground_truth names true pairs, the report will "
            "have no metrics; add images and sounds, or increase pair.splits.audio.test",
            counts["test"],
            MIN_TEST_PAIRS,
        )
    with record_checksums("pair", layout.pairs):
        _write(layout.pairs, config, result, stats)
    return report


def _held_out(rows: list[dict[str, Any]], key: str) -> set[str]:
    return {row[name] for row in rows if row["holdout"] for name in (key, "group_id")}


def _upstream_abstentions(layout: ProjectPaths, pool: set[str]) -> dict[str, tuple[str, bool]]:
    """Pool images without a caption, with the code and whether they are quarantined (else: abstained)."""
    found: dict[str, tuple[str, bool]] = {}
    for row in read_table(layout.captions / "abstained.parquet", ABSTAINED).to_pylist():
        if row["image_id"] in pool:
            found[row["image_id"]] = (row["code"], False)
    for row in read_table(layout.captions / "quarantine.parquet", QUARANTINE).to_pylist():
        if row["item_id"] in pool:
            found[row["item_id"]] = (row["code"], True)
    return found


def _embeddings(layout: ProjectPaths, config: PairConfig, pool: set[str]) -> tuple[Vectors, float]:
    """Vectors by audio id, and the z-score that a match must reach, estimated on pool audio."""
    folder = layout.embeddings
    audio_ids = read_table(folder / "audio_ids.parquet", AUDIO_IDS)["audio_id"].to_pylist()
    text_ids = read_table(folder / "text_ids.parquet", TEXT_IDS)["text_id"].to_pylist()
    audio, text = _matrix(folder / "audio.npy", len(audio_ids)), _matrix(folder / "text.npy", len(text_ids))
    in_pool = np.array([name in pool for name in audio_ids], dtype=bool)
    threshold = null_threshold(text, audio[in_pool], config.null_quantile, config.null_samples, config.seed)
    return dict(zip(audio_ids, audio, strict=True)), threshold


def _matrix(path: Path, rows: int) -> FloatArray:
    if not path.is_file():
        raise DataError(f"{path} is missing", "run: dvc repro embed")
    verified_sha256(path)
    matrix = np.load(path, allow_pickle=False, mmap_mode="r")
    if matrix.ndim != 2 or matrix.dtype != np.float32 or len(matrix) != rows:
        raise DataError(
            f"{path} is {matrix.dtype} {matrix.shape}, its id table has {rows} rows", "run: dvc repro --force embed"
        )
    return np.asarray(matrix)


def _fill_report(report: StageReport, pool: set[str], upstream: Mapping[str, tuple[str, bool]], result: PairingResult) -> None:
    """Set the counts of the report.

    Raises:
        DataError: a pool image has no outcome or more than one.
    """
    ends = Counter([*upstream, *(row["image_id"] for row in result.abstained), *(row["image_id"] for row in result.pairs)])
    lost = sorted(pool - set(ends))
    if lost:
        raise DataError(
            f"{len(lost)} images have neither events nor a reason (first: {lost[0]})", "run: dvc repro --force caption"
        )
    twice = sorted(name for name, count in ends.items() if count > 1)
    if twice:
        raise DataError(f"{len(twice)} images have two outcomes (first: {twice[0]})", "run: dvc repro --force caption")
    report.n_in = len(pool)
    report.n_ok = len(result.pairs)
    report.n_quarantined = sum(quarantined for _, quarantined in upstream.values())
    report.n_abstained = len(result.abstained) + len(upstream) - report.n_quarantined


def _write(folder: Path, config: PairConfig, result: PairingResult, stats: dict[str, Any]) -> None:
    """Write tables, card and Croissant description, then `stats.json`, which marks the folder as complete."""
    pairs = write_table(folder / "pairs.parquet", PAIRS, result.pairs).to_pylist()
    write_table(folder / "abstained.parquet", ABSTAINED, result.abstained)
    write_text(folder / "README.md", render_card(pairs, stats, dict(flatten(config.model_dump())), "Seeing Sound pairs"))
    files = [
        {"name": name, "format": kind, "sha256": sha256_file(folder / name)}
        for name, kind in (("pairs.parquet", "application/x-parquet"), ("abstained.parquet", "application/x-parquet"))
    ]
    description = f"{len(pairs)} images, each paired automatically with a clip of an unrelated collection."
    write_json(folder / "croissant.json", croissant(pairs, files, "seeing_sound_pairs", description, __version__))
    write_json(folder / "stats.json", stats)
