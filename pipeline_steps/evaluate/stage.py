"""Stage `evaluate`: how good the pairs and the model are, beside controls, and a report for people."""

from __future__ import annotations

import io
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps import tracking
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.atomic import write_bytes
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
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import (
    EvaluationPlan,
    build_evaluation_plan,
    evenly_spaced_indices,
    item_texts,
    mix_id,
    pair_tracks,
)
from pipeline_steps.evaluate.generation import ImageGenerator, render
from pipeline_steps.evaluate.ground_truth import GroundTruth, match, parse_manifest
from pipeline_steps.evaluate.judges.feature_extractors import VECTOR, build_audio_judge, build_image_judge
from pipeline_steps.evaluate.judges.hub_vision_model import HubImageFeatureExtractor
from pipeline_steps.evaluate.judges.independence import check_judge_independence, families_in, undeclared_family_warnings
from pipeline_steps.evaluate.judges.whitened_space import MIN_REFERENCE
from pipeline_steps.evaluate.report.build import MediaLoaders, TrainingHistory, build_report
from pipeline_steps.evaluate.report.item_flow import StageTables
from pipeline_steps.evaluate.report.media import mp3, png, strip, thumbnail
from pipeline_steps.evaluate.report.training_curves import training_curves
from pipeline_steps.evaluate.retrieval.gold_retrieval import EmbeddingTable, gold_retrieval, retrieval_block
from pipeline_steps.evaluate.retrieval.label_oracle import label_vectors
from pipeline_steps.evaluate.run_evaluation import (
    EvaluationContext,
    EvaluationResult,
    run_evaluation,
    select_calibration_images,
)
from pipeline_steps.tracking.client.tracker import NoOpTracker

__all__ = ["EvaluateConfig", "evaluate", "run"]

Row = dict[str, Any]
TRACKED_SOUNDS = 8
COMPARED_SOUNDS = 16
"""Items of each set whose drawings are kept with the run, for a look at two models side by side."""
COMPARED_SIDE = 128
MAX_GOLD_BYTES = 50_000_000
REPORT_FOLDERS = ("samples", "audio", "plots")


@dataclass(frozen=True, slots=True)
class EvaluationInputs:
    """What the stages before left, read and checked."""

    tables: StageTables
    neighbours: list[Row]
    statistics: Row
    truth: GroundTruth
    took_part: dict[str, set[str]]
    captioner: Row


def run(config: EvaluateConfig, layout: ProjectPaths) -> StageReport:
    """Draw, judge and report; numbers and grids go to the tracker, and to the logged model that they are about."""
    from pipeline_steps.evaluate.generation import load_generator

    if config.threads:
        torch.set_num_threads(config.threads)
    read = [layout.pairs, layout.catalog, layout.media, layout.root / config.gold, layout.model]
    with tracking.run("evaluate", layout, config, inputs=read) as tracker:
        return evaluate(config, layout, load_generator(layout.model, config.guidance_scale, config.steps), tracker)


def evaluate(config: EvaluateConfig, layout: ProjectPaths, source: ImageGenerator, tracker: NoOpTracker) -> StageReport:
    """Evaluate whatever `source` draws; the balance is over test pairs and gold pairs.

    Raises:
        ConfigError: a judge of a family that took part.
        DataError: neither two test pairs nor two gold pairs, too few pictures to calibrate a judge, or a table that is
            missing or does not fit.
    """
    report = StageReport("evaluate")
    inputs = read_inputs(config, layout, source.families)
    tables, truth = inputs.tables, inputs.truth
    names: list[str] = list(config.picture_judges)
    eyes = {name: build_image_judge(name, layout.assets, config.checkpoints, layout.root) for name in names}
    ears = build_audio_judge(layout.assets)
    families = {**{name: judge.family for name, judge in eyes.items()}, str(config.sound_judge): ears.family}
    shared = check_judge_independence(families, inputs.took_part, config.allow_shared_family)
    for judge in eyes.values():
        if isinstance(judge, HubImageFeatureExtractor):
            judge.fetch()  # hours of drawing should not end at a model that cannot be had
    image_groups = {row["image_id"]: row["group_id"] for row in tables.images}
    audio_groups = {row["audio_id"]: row["group_id"] for row in tables.audio}
    agenda = build_evaluation_plan(tables.pairs, truth, image_groups, audio_groups, config.max_test_pairs)
    if max(len(items) for items in agenda.sets.values()) < 2:
        raise DataError("fewer than two test pairs and fewer than two gold pairs: nothing can be compared", "enlarge the pool")
    report.n_ok = len(agenda.sets["test"]) + len(agenda.sets["gold"])
    report.n_abstained = agenda.thinned
    report.n_in = report.n_ok + report.n_abstained

    media = MediaShardReader(layout.media)

    def open_memo(stage: str, description: Any) -> ResultCache:
        return ResultCache(config.cache_dir or str(layout.result_cache), stage, fingerprint(description), VECTOR)

    trained = [pair for pair in tables.pairs if pair["split"] == "train"]
    reference = select_calibration_images(tables.images, tables.pairs, agenda, truth.labels, config.reference_pictures)
    if len(reference) < MIN_REFERENCE:  # hours of drawing should not end here either
        raise DataError(
            f"{len(reference)} pictures of the pool are of no group that is evaluated; a judge is calibrated on "
            f"{MIN_REFERENCE} or more",
            "enlarge the pool",
        )
    known = EvaluationContext(truth.labels, image_groups, trained, reference, item_texts(agenda, tables.pairs, tables.events))
    retrieval, ranks = _retrieval(config, layout, inputs, agenda, audio_groups)
    assessment = run_evaluation(config, agenda, known, source, media, eyes, ears, open_memo)
    report.computed, report.reused = assessment.computed, assessment.reused
    evaluation: Row = {**assessment.evaluation, "protocol": _protocol(config, source, inputs, shared)}
    evaluation["warnings"] = [
        *shared,
        *undeclared_family_warnings(families, inputs.captioner),
        *assessment.evaluation["warnings"],
    ]
    if truth.unmatched:
        evaluation["warnings"].append(f"{truth.unmatched} rows of the ground-truth table are not in the catalog")
    if retrieval:
        evaluation["retrieval"] = retrieval
    recipes = dict(zip((sound.key for sound in agenda.sounds), agenda.tracks, strict=True))
    recipes |= {mix_id(pair_tracks(pair)): pair_tracks(pair) for pair in tables.pairs}  # the report plays what was paired
    sources = MediaLoaders(media.image, lambda key: render(recipes.get(key, ((key, 0.0),)), media.sound))
    files = build_report(
        config,
        evaluation,
        assessment,
        agenda,
        ranks,
        tables,
        inputs.neighbours,
        inputs.statistics,
        truth.labels,
        read_training(layout.model),
        sources,
    )
    write_report(layout.reports, files)
    report.metrics = {
        "sounds_drawn": len(agenda.sounds),
        "report_bytes": sum(map(len, files.values())),
        "report_files": len(files),
    }
    _track(tracker, layout, evaluation, agenda, assessment, sources)
    return report


def read_inputs(config: EvaluateConfig, layout: ProjectPaths, model_families: frozenset[str]) -> EvaluationInputs:
    """Every table the report speaks of, the ground truth, and the families of all networks that made data or model.

    Raises:
        DataError: a file is missing or does not fit.
    """

    def read(path: Path, contract: TableSchema) -> list[Row]:
        return list(read_table(path, contract).to_pylist())

    tables = StageTables(
        images=read(layout.catalog / "images.parquet", IMAGES),
        audio=read(layout.catalog / "audio.parquet", AUDIO),
        quarantine=read(layout.catalog / "quarantine.parquet", QUARANTINE),
        events=read(layout.captions / "events.parquet", EVENTS),
        captions_abstained=read(layout.captions / "abstained.parquet", ABSTAINED),
        captions_quarantine=read(layout.captions / "quarantine.parquet", QUARANTINE),
        embeddings_quarantine=read(layout.embeddings / "quarantine.parquet", QUARANTINE),
        pairs=read(layout.pairs / "pairs.parquet", PAIRS),
        pairs_abstained=read(layout.pairs / "abstained.parquet", ABSTAINED),
    )
    gold = layout.root / config.gold
    if not gold.is_file():
        raise DataError(f"evaluate.gold: {gold} is missing", "point it at a table with ground truth; a header alone is enough")
    if gold.stat().st_size > MAX_GOLD_BYTES:
        raise DataError(f"evaluate.gold: {gold} is larger than {MAX_GOLD_BYTES} bytes")
    truth = match(parse_manifest(gold.read_text(encoding="utf-8-sig"), config.gold), tables.images, tables.audio)
    captioner = _json(layout.captions / "meta.json")
    took_part = {
        "captions": families_in(captioner),
        "embeddings": families_in(_json(layout.embeddings / "meta.json")),
        "model": set(model_families),
    }
    return EvaluationInputs(
        tables,
        read(layout.retrieval / "neighbors.parquet", NEIGHBORS),
        _json(layout.pairs / "stats.json"),
        truth,
        took_part,
        captioner,
    )


def read_training(model: Path) -> TrainingHistory:
    """Loss curves and sample grids that training left in the model folder; what is not there is not shown."""
    folder = model / "training"
    grids = {}
    for path in sorted(folder.glob("*.png")):
        step = re.search(r"(\d+)", path.stem)
        if step:
            grids[int(step.group(1))] = path.read_bytes()
    return TrainingHistory(
        training_curves({path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.csv"))}), grids
    )


def write_report(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace the report's folders by `files` (relative path -> bytes), each whole; numbers and page are written last."""
    for name in REPORT_FOLDERS:
        scratch = folder / f".{name}.new"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for path, payload in files.items():
            parent, _, leaf = path.rpartition("/")
            if parent == name:
                (scratch / leaf).write_bytes(payload)
        shutil.rmtree(folder / name, ignore_errors=True)
        scratch.replace(folder / name)
    for path, payload in files.items():
        if "/" not in path:
            write_bytes(folder / path, payload)


def _retrieval(
    config: EvaluateConfig,
    layout: ProjectPaths,
    inputs: EvaluationInputs,
    agenda: EvaluationPlan,
    audio_groups: Mapping[str, str],
) -> tuple[Row | None, list[Row]]:
    """The retrieval block of evaluation.json and the rank of every gold pair."""
    folder = layout.embeddings
    meta = _json(folder / "meta.json")
    text_rows = read_table(folder / "text_ids.parquet", TEXT_IDS).to_pylist()
    audio_rows = read_table(folder / "audio_ids.parquet", AUDIO_IDS).to_pylist()
    texts, sounds = (_vectors(folder / name, meta) for name in ("text.npy", "audio.npy"))
    space = EmbeddingTable(
        texts, {row["text_id"]: row["row"] for row in text_rows}, sounds, {row["audio_id"]: row["row"] for row in audio_rows}
    )
    events: dict[str, list[Mapping[str, Any]]] = {}
    for event in inputs.tables.events:
        events.setdefault(event["image_id"], []).append(event)
    labels = sorted({pair.label for pair in inputs.truth.pairs if pair.label is not None})
    probe = text_rows[0]["phrase"] if text_rows else None
    cache_url = config.cache_dir or str(layout.result_cache)
    vectors = label_vectors(layout, cache_url, meta, labels, probe, texts[0]) if labels and probe is not None else None
    found = gold_retrieval(
        inputs.truth.pairs,
        space,
        events,
        vectors,
        agenda.seen_classes,
        audio_groups,
        config.bootstrap_repeats,
        config.seed,
    )
    return (retrieval_block(found, str(meta["space"]), config.seed), found["ranks"]) if found else (None, [])


def _vectors(path: Path, meta: Row) -> FloatArray:
    payload = path.read_bytes() if path.is_file() else b""
    if sha256_bytes(payload) != meta["sha256"][path.name]:
        raise IntegrityError(f"{path}: not the bytes that meta.json names", "run: dvc repro --force embed")
    return np.asarray(np.load(io.BytesIO(payload), allow_pickle=False), np.float32)


def _protocol(config: EvaluateConfig, source: ImageGenerator, inputs: EvaluationInputs, shared: list[str]) -> Row:
    kept = (
        "samples_per_sound", "unconditional_samples", "seed", "bootstrap_repeats",
        "density_neighbours", "sound_judge", "max_test_pairs", "judge_shrinkage",
    )  # fmt: skip
    return {
        **{name: getattr(config, name) for name in kept},
        "picture_judges": list(config.picture_judges),
        "guidance_scale": source.guidance_scale,
        "steps": source.steps,
        "sample_rate_hz": source.sample_rate_hz,
        "side_px": source.side,
        "families_that_took_part": sorted(set().union(*inputs.took_part.values())),
        "shared_families": shared,
    }


def _track(
    tracker: NoOpTracker,
    layout: ProjectPaths,
    evaluation: Row,
    agenda: EvaluationPlan,
    assessment: EvaluationResult,
    sources: MediaLoaders,
) -> None:
    """Every number, one grid per set (each line a sound: its samples beside those of another sound), and some sounds."""
    numbers: Row = {}
    for key in agenda.sets:
        for row, metrics in evaluation.get(key, {}).get("rows", {}).items():
            for metric, found in metrics.items():
                if isinstance(found, dict) and found.get("value") is not None:
                    numbers[f"{key}/{row}/{metric}"] = found["value"]
                    if row == "model" and found.get("low") is not None:
                        numbers |= {f"{key}/{row}/{metric}.low": found["low"], f"{key}/{row}/{metric}.high": found["high"]}
    for row, metrics in evaluation.get("retrieval", {}).get("rows", {}).items():
        numbers |= {f"retrieval/{row}/{metric}": found["value"] for metric, found in metrics.items()}
    tracker.log_metrics(numbers)
    tracker.log_model_metrics(layout.model, {key: value for key, value in numbers.items() if "/model/" in key}, layout.pairs)
    for key, outcome in assessment.outcomes.items():
        lines = []
        for sound in sorted({item.sound for item in agenda.sets[key]})[:16]:
            other = int(outcome.partner[sound])
            shuffled = assessment.drawn[other] if other >= 0 else np.full_like(assessment.drawn[sound], 255)
            lines.append(strip(np.concatenate([assessment.drawn[sound], shuffled])))
        tracker.log_image(f"evaluate/{key}_real_and_shuffled", np.concatenate(lines))
    for item in agenda.sets["test"][:TRACKED_SOUNDS]:
        tracker.log_audio(f"evaluate/{item.name}", sources.sound(agenda.sounds[item.sound].key), SAMPLE_RATE)
    for name in ("evaluation.json", "index.html", "plots"):  # the page's media stay on disk: they are hundreds of files
        tracker.log_artifact(layout.reports / name, folder="report")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "compare"
        folder.mkdir()
        for name, payload in _samples(agenda, assessment, sources).items():
            (folder / name).write_bytes(payload)
        tracker.log_artifact(folder, folder="report")


def _samples(agenda: EvaluationPlan, assessment: EvaluationResult, sources: MediaLoaders) -> dict[str, bytes]:
    """What `sonify compare` shows side by side: evenly spread items of each set, the same for every model on this data."""
    files: dict[str, bytes] = {}
    for key in ("test", "gold"):
        items = agenda.sets[key]
        for item in (items[place] for place in evenly_spaced_indices(len(items), COMPARED_SOUNDS)):
            sound = agenda.sounds[item.sound].key
            files[f"drawn-{sound}.png"] = png(strip(assessment.drawn[item.sound]))
            files[f"picture-{item.image_id}.jpg"] = thumbnail(sources.picture(item.image_id), COMPARED_SIDE)
            files[f"sound-{sound}.mp3"] = mp3(sources.sound(sound))
    return files


def _json(path: Path) -> Row:
    if not path.is_file():
        raise DataError(f"{path} is missing", "run the stage that writes it: dvc repro")
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object")
    return value
