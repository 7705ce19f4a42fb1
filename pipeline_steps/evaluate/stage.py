"""Stage `evaluate`: metrics of the pairs and of the model beside controls, and the report."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps import tracking
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.atomic import write_bytes
from pipeline_steps.core.checksums import read_verified, verified_sha256
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import fingerprint, sha256_bytes
from pipeline_steps.core.media_shards import SAMPLE_RATE, MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.schemas import (
    ABSTAINED,
    AUDIO,
    AUDIO_IDS,
    EVENTS,
    IMAGES,
    NEIGHBORS,
    PAIRS,
    QUARANTINE,
    TEXT_IDS,
    TableSchema,
)
from pipeline_steps.core.stage_report import StageReport
from pipeline_steps.core.tables import read_table
from pipeline_steps.evaluate.abilities.run_abilities import ability_numbers
from pipeline_steps.evaluate.audio_captions import caption_audio
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import (
    EvaluationPlan,
    build_evaluation_plan,
    evenly_spaced_indices,
    pair_texts,
    select_calibration_images,
    tracks_by_mix,
)
from pipeline_steps.evaluate.generation import ImageGenerator, render
from pipeline_steps.evaluate.ground_truth import GroundTruth, match, parse_manifest
from pipeline_steps.evaluate.judges.base import AUDIO_JUDGES, IMAGE_JUDGES
from pipeline_steps.evaluate.judges.feature_extractors import VECTOR, judge_setup
from pipeline_steps.evaluate.judges.independence import check_judge_independence, families_in, undeclared_family_warnings
from pipeline_steps.evaluate.judges.whitened_space import MIN_IMAGES
from pipeline_steps.evaluate.report.build import build_report
from pipeline_steps.evaluate.report.dvc_plots import sample_grids
from pipeline_steps.evaluate.report.headline_metrics import chance_warnings
from pipeline_steps.evaluate.report.item_flow import StageTables
from pipeline_steps.evaluate.report.media import mp3, png, strip, thumbnail
from pipeline_steps.evaluate.report.training_curves import TrainingHistory, training_curves
from pipeline_steps.evaluate.retrieval.gold_retrieval import EmbeddingTable, gold_retrieval, retrieval_block
from pipeline_steps.evaluate.retrieval.label_oracle import label_vectors
from pipeline_steps.evaluate.run_evaluation import EvaluationResult, generate_only, run_evaluation
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.tracking.client.tracker import NoOpTracker

__all__ = ["EvaluateConfig", "evaluate", "run"]

Row = dict[str, Any]
log = logging.getLogger(__name__)

TRACKED_CLIPS = 8
"""Audio clips of the test set that are logged with the run."""
COMPARED_PAIRS = 16
"""Pairs of each set whose samples are logged with the run, for the comparison of two models."""
COMPARED_SIDE = 128
"""px of the longer side of a real image that is logged with the run."""
MAX_GROUND_TRUTH_BYTES = 50_000_000
REPORT_FOLDERS = ("samples", "audio", "plots")


def run(config: EvaluateConfig, layout: ProjectPaths) -> StageReport:
    """Evaluate the exported model; numbers and samples are logged with the tracking run and with the logged model."""
    from pipeline_steps.evaluate.generation import load_generator

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    truth = [layout.root / config.ground_truth] if config.ground_truth else []
    read = [layout.pairs, layout.catalog, layout.media, *truth, layout.model]
    with tracking.run("evaluate", layout, config, inputs=read) as tracker:
        generator = load_generator(layout.model, config.guidance_scale, config.num_inference_steps)
        return evaluate(config, layout, generator, tracker)


def evaluate(config: EvaluateConfig, layout: ProjectPaths, generator: ImageGenerator, tracker: NoOpTracker) -> StageReport:
    """Evaluate a generator and write the report; its counts are test pairs and gold pairs.

    Raises:
        ConfigError: the model family of a judge is also used for the data or the model.
        DataError: a table is missing or not valid.
    """
    report = StageReport("evaluate")
    tables = read_tables(layout)
    truth = read_ground_truth(config, layout, tables)
    captions_meta, embeddings_meta = _json(layout.captions / "meta.json"), _json(layout.embeddings / "meta.json")
    used_families = {
        "captions": families_in(captions_meta),
        "embeddings": families_in(embeddings_meta),
        "model": set(generator.families),
    }
    image_judges = {name: IMAGE_JUDGES.get(name).from_setup(judge_setup(config, name, layout)) for name in config.image_judges}
    audio_judge = AUDIO_JUDGES.get(config.audio_judge).from_setup(judge_setup(config, config.audio_judge, layout))
    judge_families = {name: judge.family for name, judge in image_judges.items()} | {config.audio_judge: audio_judge.family}
    shared = check_judge_independence(judge_families, used_families, config.allow_shared_family)
    for judge in (*image_judges.values(), audio_judge):
        judge.fetch()  # a missing checkpoint fails here, not after hours of generation

    image_groups = {row["image_id"]: row["group_id"] for row in tables.images}
    audio_groups = {row["audio_id"]: row["group_id"] for row in tables.audio}
    plan = build_evaluation_plan(tables.pairs, truth, image_groups, audio_groups, config.max_test_pairs)
    calibration_images = select_calibration_images(plan, tables.images, tables.pairs, config.num_calibration_images)
    too_few = plan.too_few_to_judge(len(calibration_images), MIN_IMAGES)
    evaluated = len(plan.sets["test"]) + len(plan.sets["gold"])
    report.n_in = evaluated + plan.num_skipped
    report.n_ok, report.n_abstained = (0, report.n_in) if too_few else (evaluated, plan.num_skipped)

    def open_cache(stage: str, description: Any) -> ResultCache:
        return ResultCache(_cache_url(config, layout), stage, fingerprint(description), VECTOR)

    space, phrases = read_embeddings(layout, embeddings_meta)
    retrieval, ranks = _retrieval(config, layout, embeddings_meta, space, phrases, tables, truth, plan, audio_groups)
    media = MediaShardReader(layout.media)
    texts = pair_texts(plan, tables.pairs, tables.events)
    tagger = find_audio_tagger(layout)
    result = (
        generate_only(config, plan, generator, media, too_few)
        if too_few
        else run_evaluation(
            config,
            plan,
            calibration_images,
            texts,
            None if tagger is None else partial(caption_audio, tagger),
            {audio_id: space.audio[row] for audio_id, row in space.audio_row.items()},
            generator,
            media,
            image_judges,
            audio_judge,
            open_cache,
        )
    )
    report.cache_misses, report.cache_hits = result.cache_misses, result.cache_hits
    protocol = _protocol(config, generator) | {
        "model_index_sha256": verified_sha256(index) if (index := layout.model / "model_index.json").is_file() else None,
        "families_that_took_part": sorted(set().union(*used_families.values())),
        "shared_families": shared,
    }
    evaluation: Row = {**result.evaluation, "protocol": protocol}
    warnings = [*shared, *undeclared_family_warnings(judge_families, captions_meta), *result.evaluation["warnings"]]
    if truth.num_unmatched:
        warnings.append(f"{truth.num_unmatched} rows of the ground-truth table are not in the catalog")
    evaluation["warnings"] = warnings
    if retrieval:
        evaluation["retrieval"] = retrieval

    tracks = tracks_by_mix(plan, tables.pairs)

    def load_audio(key: str) -> FloatArray:
        return render(tracks.get(key, ((key, 0.0),)), media.sound)

    history = read_training_history(layout.model)
    files = build_report(config, evaluation, result, plan, ranks, tables, history, media.image, load_audio)
    write_report(layout.reports, files)
    report.metrics = {
        "clips_rendered": len(plan.clips),
        "report_bytes": sum(map(len, files.values())),
        "report_files": len(files),
    }
    _track(tracker, layout, evaluation, json.loads(files["metrics.json"]), plan, result, media, load_audio)
    return report


def read_tables(layout: ProjectPaths) -> StageTables:
    """Tables of the stages before this one.

    Raises:
        DataError: a file is missing or not valid.
    """

    def read(path: Path, schema: TableSchema) -> list[Row]:
        return list(read_table(path, schema).to_pylist())

    return StageTables(
        images=read(layout.catalog / "images.parquet", IMAGES),
        audio=read(layout.catalog / "audio.parquet", AUDIO),
        quarantine=read(layout.catalog / "quarantine.parquet", QUARANTINE),
        events=read(layout.captions / "events.parquet", EVENTS),
        captions_abstained=read(layout.captions / "abstained.parquet", ABSTAINED),
        captions_quarantine=read(layout.captions / "quarantine.parquet", QUARANTINE),
        embeddings_quarantine=read(layout.embeddings / "quarantine.parquet", QUARANTINE),
        pairs=read(layout.pairs / "pairs.parquet", PAIRS),
        pairs_abstained=read(layout.pairs / "abstained.parquet", ABSTAINED),
        neighbors=read(layout.retrieval / "neighbors.parquet", NEIGHBORS),
        pair_statistics=_json(layout.pairs / "stats.json"),
    )


def read_ground_truth(config: EvaluateConfig, layout: ProjectPaths, tables: StageTables) -> GroundTruth:
    """Labels and true pairs of `evaluate.ground_truth`; none if it is null.

    Raises:
        DataError: the file is missing, too large, or lacks a column.
    """
    if config.ground_truth is None:
        return match([], tables.images, tables.audio)
    path = layout.root / config.ground_truth
    if not path.is_file():
        raise DataError(f"evaluate.ground_truth: {path} is missing", "set it to a table with ground truth, or to null")
    if path.stat().st_size > MAX_GROUND_TRUTH_BYTES:
        raise DataError(f"evaluate.ground_truth: {path} is larger than {MAX_GROUND_TRUTH_BYTES} bytes")
    rows = parse_manifest(path.read_text(encoding="utf-8-sig"), config.ground_truth)
    return match(rows, tables.images, tables.audio)


def read_training_history(model: Path) -> TrainingHistory:
    """Loss curves and sample grids of the folder `training` of an exported model; missing files are left out."""
    folder = model / "training"
    grids = {}
    for path in sorted(folder.glob("*.png")):
        step = re.search(r"(\d+)", path.stem)
        if step:
            grids[int(step.group(1))] = read_verified(path)
    tables = {path.name: read_verified(path).decode("utf-8") for path in sorted(folder.glob("*.csv"))}
    return TrainingHistory(training_curves(tables), grids)


def write_report(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace the report by `files` (relative path -> bytes): each folder as a whole, then numbers and page."""
    for name in REPORT_FOLDERS:
        scratch = folder / f".{name}.new"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for path, payload in files.items():
            if path.startswith(f"{name}/"):
                target = scratch / path.removeprefix(f"{name}/")
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(payload)
        shutil.rmtree(folder / name, ignore_errors=True)
        scratch.replace(folder / name)
    for path, payload in files.items():
        if "/" not in path:
            write_bytes(folder / path, payload)


def find_audio_tagger(layout: ProjectPaths) -> YamNet | None:
    """YAMNet of the exported model, else of the stage `assets`; None if neither has it. Its weights are loaded when needed."""
    folders = [layout.model / "encoder", layout.assets]
    return next((YamNet(folder) for folder in folders if all((folder / file).is_file() for file in YamNet.files)), None)


def read_embeddings(layout: ProjectPaths, meta: Row) -> tuple[EmbeddingTable, list[str]]:
    """Embeddings of texts and audio, and the phrases of the texts in the order of their table.

    Raises:
        DataError: a table is missing or not valid.
        IntegrityError: the vectors are not those that the stage `embed` wrote.
    """
    folder = layout.embeddings
    text_rows = read_table(folder / "text_ids.parquet", TEXT_IDS).to_pylist()
    audio_rows = read_table(folder / "audio_ids.parquet", AUDIO_IDS).to_pylist()
    texts, audio = (_vectors(folder / name, meta) for name in ("text.npy", "audio.npy"))
    space = EmbeddingTable(
        texts, {row["text_id"]: row["row"] for row in text_rows}, audio, {row["audio_id"]: row["row"] for row in audio_rows}
    )
    return space, [row["phrase"] for row in text_rows]


def _retrieval(
    config: EvaluateConfig,
    layout: ProjectPaths,
    meta: Row,
    space: EmbeddingTable,
    phrases: list[str],
    tables: StageTables,
    truth: GroundTruth,
    plan: EvaluationPlan,
    audio_groups: Mapping[str, str],
) -> tuple[Row | None, list[Row]]:
    """The block `retrieval` of `evaluation.json`, and the rank of every gold pair."""
    labels = sorted({pair.label for pair in truth.pairs if pair.label is not None})
    vectors = (
        label_vectors(layout, _cache_url(config, layout), meta, labels, phrases[0], space.texts[0])
        if labels and phrases
        else None
    )
    found = gold_retrieval(
        truth.pairs, space, tables.events, vectors, plan.seen_classes, audio_groups, config.num_bootstrap, config.seed
    )
    return (retrieval_block(found, str(meta["space"]), config.seed), found["ranks"]) if found else (None, [])


def _cache_url(config: EvaluateConfig, layout: ProjectPaths) -> str:
    return config.cache_dir or str(layout.result_cache)


def _vectors(path: Path, meta: Row) -> FloatArray:
    payload = read_verified(path) if path.is_file() else b""
    if sha256_bytes(payload) != meta["sha256"][path.name]:
        raise IntegrityError(f"{path}: sha256 differs from the one in meta.json", "run: dvc repro --force embed")
    return np.asarray(np.load(io.BytesIO(payload), allow_pickle=False), np.float32)


def _protocol(config: EvaluateConfig, generator: ImageGenerator) -> Row:
    """Conditions of the evaluation that `evaluation.json` records."""
    kept = (
        "samples_per_audio", "unconditional_samples", "seed", "num_bootstrap", "density_k", "image_judges", "audio_judge",
        "max_test_pairs", "judge_shrinkage",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in kept},
        "guidance_scale": generator.guidance_scale,
        "num_inference_steps": generator.num_inference_steps,
        "sample_rate_hz": generator.sample_rate_hz,
        "side_px": generator.resolution,
    }


def _track(
    tracker: NoOpTracker,
    layout: ProjectPaths,
    evaluation: Row,
    headline: Row,
    plan: EvaluationPlan,
    result: EvaluationResult,
    media: MediaShardReader,
    load_audio: Callable[[str], FloatArray],
) -> None:
    """Log numbers, a grid of samples per set, clips and the report; warn of a model that is not above chance."""
    warnings = chance_warnings(headline)
    for warning in warnings:
        log.warning("%s; infra/gate.yaml decides whether such a challenger may become champion", warning)
    numbers: Row = {}
    for key in plan.sets:
        for row, metrics in evaluation.get(key, {}).get("rows", {}).items():
            for metric, found in metrics.items():
                if isinstance(found, dict) and found.get("value") is not None:
                    numbers[f"{key}/{row}/{metric}"] = found["value"]
                    if row == "model" and found.get("low") is not None:
                        numbers |= {f"{key}/{row}/{metric}.low": found["low"], f"{key}/{row}/{metric}.high": found["high"]}
    for row, metrics in evaluation.get("retrieval", {}).get("rows", {}).items():
        numbers |= {f"retrieval/{row}/{metric}": found["value"] for metric, found in metrics.items()}
    for key, rows in evaluation.get("memorisation", {}).get("sets", {}).items():
        for row, metrics in rows.items():
            numbers |= {f"{key}/{row}/{metric}": found["value"] for metric, found in metrics.items()}
    numbers |= ability_numbers(evaluation["abilities"])
    tracker.log_metrics(numbers)
    tracker.log_pipeline_metrics(headline)
    tracker.log_model_metrics(layout.model, headline, layout.pairs, warnings)
    for key, grid in sample_grids(plan, result.generated, media.image).items():
        tracker.log_image(f"evaluate/{key}_real_and_generated", grid)
    for pair in plan.sets["test"][:TRACKED_CLIPS]:
        tracker.log_audio(f"evaluate/{pair.name}", load_audio(plan.clips[pair.clip].key), SAMPLE_RATE)
    for name in ("evaluation.json", "index.html", "plots"):  # the media of the page, hundreds of files, are not logged
        tracker.log_artifact(layout.reports / name, folder="report")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "compare"
        folder.mkdir()
        for name, payload in _compared_samples(plan, result, media, load_audio).items():
            (folder / name).write_bytes(payload)
        tracker.log_artifact(folder, folder="report")


def _compared_samples(
    plan: EvaluationPlan, result: EvaluationResult, media: MediaShardReader, load_audio: Callable[[str], FloatArray]
) -> dict[str, bytes]:
    """Files that `sonify compare` shows side by side: evenly spaced pairs of each set, the same for every model."""
    files: dict[str, bytes] = {}
    for key in ("test", "gold"):
        pairs = plan.sets[key]
        for pair in (pairs[index] for index in evenly_spaced_indices(len(pairs), COMPARED_PAIRS)):
            clip = plan.clips[pair.clip].key
            files[f"drawn-{clip}.png"] = png(strip(result.generated[pair.clip]))
            files[f"picture-{pair.image_id}.jpg"] = thumbnail(media.image(pair.image_id), COMPARED_SIDE)
            files[f"sound-{clip}.mp3"] = mp3(load_audio(clip))
    return files


def _json(path: Path) -> Row:
    if not path.is_file():
        raise DataError(f"{path} is missing", "run the stage that writes it: dvc repro")
    value = json.loads(read_verified(path))
    if not isinstance(value, dict):
        raise DataError(f"{path}: the content is no JSON object", "run the stage that writes it: dvc repro --force")
    return value
