"""Run the evaluation: generate images, extract features, compute metrics. Reads media and caches; writes nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline_steps.audio.mixing import pair_tracks
from pipeline_steps.core.array_types import ByteArray, DoubleArray, FloatArray
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.diffusion.image_processor import pad_to_square
from pipeline_steps.evaluate.abilities.base import AbilitySetup
from pipeline_steps.evaluate.abilities.run_abilities import AbilityResults, ShownSweep, run_abilities
from pipeline_steps.evaluate.abilities.scores import ClassSpace
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import EvaluationPlan, evenly_spaced_indices, mix_id, tracks_by_mix
from pipeline_steps.evaluate.generation import ImageGenerator, render
from pipeline_steps.evaluate.judges import audio_image_regression, whitened_space
from pipeline_steps.evaluate.judges.base import AudioFeatureExtractor, ImageFeatureExtractor
from pipeline_steps.evaluate.judges.feature_extractors import (
    CachedFeatures,
    CacheFactory,
    extract_generated_features,
    extract_image_features,
    map_items,
)
from pipeline_steps.evaluate.metrics.bootstrap import Estimate
from pipeline_steps.evaluate.metrics.gain_sensitivity import gain_distances
from pipeline_steps.evaluate.metrics.memorisation import memorisation_block
from pipeline_steps.evaluate.metrics.set_metrics import SetEvaluator, SetFeatures, SetMetrics, metric_entry
from pipeline_steps.evaluate.nearest_training import nearest_training_images

log = logging.getLogger(__name__)

Row = dict[str, Any]

SENSITIVITY_SAMPLES = 2
"""Samples of each clip and gain in the measurement of gain sensitivity."""


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Results of the evaluation.

    Attributes:
        evaluation: blocks of `evaluation.json`: one per set, `sensitivity`, `abilities`, `memorisation`, `judges`, `warnings`;
            `too_few_to_judge` if nothing could be measured.
        sets: results of the first image judge by name of the set; a set of fewer than two pairs is absent.
        per_pair: values of all judges, one row per set and pair.
        bootstrap: "set/metric" -> bootstrap values [B] of the model row; see `SetMetrics.bootstrap`.
        generated: [M, S, H, W, 3] samples of each clip.
        shown_sweeps: images and audio of the abilities for the report.
        cache_misses, cache_hits: features of catalog items that were computed, and read from the cache.
    """

    evaluation: Row
    sets: Mapping[str, SetMetrics]
    per_pair: list[Row]
    bootstrap: Mapping[str, DoubleArray]
    generated: ByteArray
    shown_sweeps: Sequence[ShownSweep]
    cache_misses: int
    cache_hits: int


def run_evaluation(
    config: EvaluateConfig,
    plan: EvaluationPlan,
    calibration_images: Sequence[str],
    texts: Mapping[str, str],
    caption: Callable[[FloatArray], str] | None,
    audio_vectors: Mapping[str, FloatArray],
    generator: ImageGenerator,
    media: MediaShardReader,
    image_judges: Mapping[str, ImageFeatureExtractor],
    audio_judge: AudioFeatureExtractor,
    open_cache: CacheFactory,
) -> EvaluationResult:
    """Generate images for every clip of the plan and evaluate every set by every image judge.

    Args:
        config: the section `evaluate`.
        plan: pairs and clips.
        calibration_images: ids of real images on which the judges are calibrated.
        texts: text by name of a pair, for the text oracle.
        caption: returns words for a clip, for the row `caption_route`; None without an audio tagger.
        audio_vectors: unit embeddings of the retrieval space by audio id, for the row `nearest_training_image`.
        generator: of the evaluated model.
        media: images and audio of the catalog.
        image_judges: by name; the first one gives the headline numbers.
        audio_judge: audio encoder of the audio-image agreement.
        open_cache: opens the cache of features.
    """
    clips = [render(clip.tracks, media.sound) for clip in plan.clips]
    log.info("generating %d images for each of %d clips", config.samples_per_audio, len(clips))
    generated = generator.generate(clips, config.samples_per_audio, config.seed)
    unconditional = generator.generate_unconditional(config.unconditional_samples, config.seed + 1)
    captions = [caption(clip) for clip in clips] if caption and generator.has_text_encoder else []
    distinct_texts = sorted({*texts.values(), *captions}) if generator.has_text_encoder else []
    from_text = generator.generate_from_text(distinct_texts, config.samples_per_audio, config.seed) if distinct_texts else None
    text_rows = {name: distinct_texts.index(text) for name, text in texts.items()} if distinct_texts else {}
    nearest_training = nearest_training_images(plan, audio_vectors)

    audio_judge.load()
    log.info("extracting audio features with %s", config.audio_judge)
    tracks = tracks_by_mix(plan, plan.training_pairs)

    def load_square(image_id: str) -> ByteArray:
        # Real images are resized as for training, like the generated ones. Otherwise judges would measure the difference
        # of the resizes (Parmar et al. 2022, arXiv 2104.11222).
        return pad_to_square(media.image(image_id), generator.resolution)

    def audio_features(keys: Sequence[str]) -> FloatArray:
        return np.stack(map_items(lambda key: audio_judge.embed(render(tracks[key], media.sound)), keys))

    audio_cache = CachedFeatures(open_cache("evaluate-sound", audio_judge.describe()), config.batch_size)
    audio = audio_cache.rows(sorted(tracks), audio_features)
    cache_misses, cache_hits = audio_cache.cache_misses, audio_cache.cache_hits

    image_ids = {pair.image_id for pairs in plan.sets.values() for pair in pairs} | set(calibration_images)
    image_ids |= {str(pair["image_id"]) for pair in plan.training_pairs}
    evaluation: Row = {"judges": {}, "warnings": []}
    by_judge: dict[str, dict[str, SetMetrics]] = {}
    for name, judge in image_judges.items():
        log.info("extracting image features with %s", name)
        judge.load()

        def image_features(ids: Sequence[str], judge: ImageFeatureExtractor = judge) -> FloatArray:
            return extract_image_features(judge, map_items(load_square, ids))

        description = [judge.describe(), "square_picture", generator.resolution]  # part of the cache key
        image_cache = CachedFeatures(open_cache("evaluate-picture", description), config.batch_size)
        features = SetFeatures(
            image_cache.rows(sorted(image_ids), image_features),
            extract_generated_features(judge, generated),
            extract_generated_features(judge, unconditional),
            np.stack([audio[clip.key] for clip in plan.clips]),
            None if from_text is None else extract_generated_features(judge, from_text),
            text_rows,
            np.array([distinct_texts.index(text) for text in captions], np.int64) if captions else None,
            nearest_training,
        )
        cache_misses, cache_hits = cache_misses + image_cache.cache_misses, cache_hits + image_cache.cache_hits
        evaluator, facts = _calibrate(config, name, generator.sample_rate_hz, plan, calibration_images, features, audio)
        by_judge[name] = {key: evaluator.evaluate(key) for key, pairs in plan.sets.items() if len(pairs) > 1}
        evaluation["judges"][name] = {**facts, "family": judge.family, **judge.identity}
        if name == config.image_judges[0]:
            abilities = _abilities(evaluator, judge, generator, clips, calibration_images, evaluation["judges"][name])
            evaluation["abilities"] = abilities.block
        if name == config.image_judges[0] and config.gain_sensitivity.num_clips and config.gain_sensitivity.gains_db:
            evaluation["sensitivity"] = _gain_sensitivity(evaluator, judge, generator, clips)
    if memorisation := memorisation_block(plan, generated, load_square, config, generator.sample_rate_hz):
        evaluation["memorisation"] = memorisation
    evaluation["warnings"] += _regression_warnings(config, plan, evaluation["judges"])
    evaluation["judges"][config.audio_judge] = {"family": audio_judge.family}
    for key, pairs in plan.sets.items():
        if found := [sets[key] for sets in by_judge.values() if key in sets]:
            rows: dict[str, Row] = {}
            for metrics in found:
                for row, entries in metrics.rows.items():
                    rows.setdefault(row, {}).update(entries)
            num_clusters = len({plan.clips[pair.clip].group for pair in pairs})
            evaluation[key] = {
                "n_pairs": len(pairs),
                "n_sounds": len(plan.clips_of(key)),
                "too_small_to_rank": num_clusters < config.min_clusters,
                "rows": rows,
            }
            # The warning about few clusters does not depend on the judge and is kept once.
            evaluation["warnings"] += dict.fromkeys(text for metrics in found for text in metrics.warnings)
    return EvaluationResult(
        evaluation,
        by_judge[config.image_judges[0]],
        _merge_per_pair(by_judge),
        {
            f"{key}/{metric}": values
            for sets in by_judge.values()
            for key, metrics in sets.items()
            for metric, values in metrics.bootstrap.items()
        },
        generated,
        abilities.shown,
        cache_misses,
        cache_hits,
    )


def generate_only(
    config: EvaluateConfig, plan: EvaluationPlan, generator: ImageGenerator, media: MediaShardReader, reason: str
) -> EvaluationResult:
    """Images for every clip of the plan, without metrics; `reason` says why nothing is measured."""
    log.warning("%s; the report shows pairs and samples without metrics", reason)
    generated = generator.generate(
        [render(clip.tracks, media.sound) for clip in plan.clips], config.samples_per_audio, config.seed
    )
    evaluation: Row = {"judges": {}, "warnings": [reason], "abilities": {}, "too_few_to_judge": reason}
    return EvaluationResult(evaluation, {}, [], {}, generated, (), 0, 0)


def _calibrate(
    config: EvaluateConfig,
    judge: str,
    sample_rate_hz: int,
    plan: EvaluationPlan,
    calibration_images: Sequence[str],
    features: SetFeatures,
    audio: Mapping[str, DoubleArray],
) -> tuple[SetEvaluator, Row]:
    """Fit the feature space and the audio-image regression of an image judge; returns its evaluator and facts on the fit."""
    labels = [plan.labels.get(image_id) for image_id in calibration_images]
    space = whitened_space.fit_space(features.images(calibration_images), labels, config.judge_shrinkage)
    facts: Row = {"space": space.kind, "reference_pictures": space.n, "reference_classes": space.classes}
    regressor = None
    groups = [str(pair["audio_group"]) for pair in plan.training_pairs]
    if audio_image_regression.has_enough_groups(groups):
        regressor = audio_image_regression.fit(
            np.stack([audio[mix_id(pair_tracks(pair))] for pair in plan.training_pairs]),
            space.project(features.images([pair["image_id"] for pair in plan.training_pairs])),
            groups,
        )
        facts |= {
            "ais_leave_group_out_r2": round(regressor.group_out_r2, 6),
            "ais_training_pairs": regressor.n,
            "ais_training_sound_groups": regressor.groups,
        }
    return SetEvaluator(config, judge, sample_rate_hz, plan, features, space, regressor), facts


def _regression_warnings(config: EvaluateConfig, plan: EvaluationPlan, facts: Mapping[str, Row]) -> list[str]:
    """Warnings that the audio-image agreement was not measured, or that its regression predicts little."""
    groups = [str(pair["audio_group"]) for pair in plan.training_pairs]
    if not audio_image_regression.has_enough_groups(groups):
        return [
            f"ais_win_rate_{config.audio_judge}: not measured; the regression needs at least "
            f"{audio_image_regression.MIN_PAIRS} training pairs of {audio_image_regression.MIN_GROUPS} sound groups, "
            f"and there are {len(groups)} of {len(set(groups))}"
        ]
    r2 = {name: float(facts[name]["ais_leave_group_out_r2"]) for name in config.image_judges}
    return [
        f"ais_win_rate_{config.audio_judge}_{name}: weak regression; on sound groups left out of the fit it predicts "
        f"{100 * value:.1f} % of the variance of the image features"
        for name, value in r2.items()
        if value < audio_image_regression.WEAK_R2
    ]


def _abilities(
    evaluator: SetEvaluator,
    judge: ImageFeatureExtractor,
    generator: ImageGenerator,
    clips: Sequence[FloatArray],
    calibration_images: Sequence[str],
    facts: Row,
) -> AbilityResults:
    """Measure the abilities by an image judge; its class space is described in `facts`.

    A judge with a text encoder compares images with the names of the classes, any other with means of calibration images.
    """
    config, plan = evaluator.config, evaluator.plan
    labels = [plan.labels.get(image) for image in calibration_images]
    known = sorted({label for label in labels if label is not None})
    texts = judge.class_features(known) if known else None
    project = evaluator.space.project if texts is None else l2_normalize
    means = None if texts is None else dict(zip(known, l2_normalize(texts), strict=True))
    classes = ClassSpace.fit(project(evaluator.features.images(calibration_images)), labels, means)
    chosen = config.abilities
    setup = AbilitySetup(plan.clips, clips, generator, classes, chosen.num_clips, chosen.num_samples, config.seed)

    def features(images: ByteArray) -> DoubleArray:
        return project(extract_generated_features(judge, images))

    def entry(estimate: Estimate, of_pixels: bool) -> Row:
        return metric_entry(estimate, "pixels" if of_pixels else evaluator.judge, config.seed, generator.sample_rate_hz)

    if texts is not None:
        facts["ability_classes_from_texts"] = True
    if classes is not None:
        facts |= {"ability_classes": len(classes.names), "ability_temperature": round(classes.temperature, 6)}
    return run_abilities(chosen.names, setup, features, entry, config.num_bootstrap)


def _gain_sensitivity(
    evaluator: SetEvaluator, judge: ImageFeatureExtractor, generator: ImageGenerator, clips: Sequence[FloatArray]
) -> Row:
    """Generate images of some clips again at other gains, with the same noise."""
    config = evaluator.config
    rows = evenly_spaced_indices(len(clips), config.gain_sensitivity.num_clips)
    num_samples = min(SENSITIVITY_SAMPLES, config.samples_per_audio)
    features = {}
    for gain in sorted({0.0, *config.gain_sensitivity.gains_db}):
        scaled = [clips[row] * np.float32(10.0 ** (gain / 20.0)) for row in rows]
        images = generator.generate(scaled, num_samples, config.seed)
        features[gain] = evaluator.space.project(extract_generated_features(judge, images))
    groups = [evaluator.plan.clips[row].group for row in rows]
    found = gain_distances(features, groups, config.num_bootstrap, config.seed)
    return {name: evaluator.entry(estimate) for name, estimate in found.items()}


def _merge_per_pair(by_judge: Mapping[str, Mapping[str, SetMetrics]]) -> list[Row]:
    """One row per set and pair with the values of all judges."""
    merged: dict[tuple[str, str], Row] = {}
    for sets in by_judge.values():
        for metrics in sets.values():
            for row in metrics.pairs:
                merged.setdefault((row["set"], row["pair"]), {}).update(row)
    return [merged[key] for key in sorted(merged)]
