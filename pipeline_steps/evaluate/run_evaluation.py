"""The measurement: draw, look, listen, compare. Reads media and memos that it is handed; writes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import ByteArray, DoubleArray
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.diffusion.image_processor import pad_to_square
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import EvaluationPlan, Track, evenly_spaced_indices, mix_id, pair_tracks
from pipeline_steps.evaluate.generation import ImageGenerator, render
from pipeline_steps.evaluate.judges import audio_image_regression, feature_extractors, whitened_space
from pipeline_steps.evaluate.judges.aisfx import AiSfx
from pipeline_steps.evaluate.metrics.gain_sensitivity import gain_distances
from pipeline_steps.evaluate.metrics.set_metrics import (
    MetricSettings,
    SetFeatures,
    SetMetrics,
    compute_set_metrics,
    metric_entry,
)

log = logging.getLogger(__name__)

Row = dict[str, Any]

SENSITIVITY_SAMPLES = 2


@dataclass(frozen=True, slots=True)
class EvaluationContext:
    """What the judges may know beside the items: labels, groups, the training pairs, real pictures to calibrate on, and what
    the captioner heard in each item's picture (`item_texts`)."""

    labels: Mapping[str, str]
    image_groups: Mapping[str, str]
    trained: Sequence[Mapping[str, Any]]
    reference: Sequence[str]
    texts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """Everything measured on drawings.

    Attributes:
        evaluation: blocks of evaluation.json: one per set, "sensitivity", "judges", "warnings".
        outcomes: set -> outcome of the first judge (its partner of each sound is what the report shows).
        items: per-item values of all judges, one row per set and pair.
        draws: "set/metric" -> bootstrap draws [repeats] of the model's distances; see `Outcome.draws`.
        drawn: [M, S, H, W, 3]; unconditional: [U, H, W, 3].
        computed, reused: features of catalog items.
    """

    evaluation: Row
    outcomes: Mapping[str, SetMetrics]
    items: list[Row]
    draws: Mapping[str, DoubleArray]
    drawn: ByteArray
    unconditional: ByteArray
    computed: int
    reused: int


def select_calibration_images(
    images: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    agenda: EvaluationPlan,
    labels: Mapping[str, str],
    at_most: int,
) -> list[str]:
    """Ids of real pictures that calibrate a judge: of the pool, of no group that is evaluated; training pairs first, then
    labelled pictures, then any, each in id order."""
    evaluated = {item.image_group for items in agenda.sets.values() for item in items}
    evaluated |= {row["image_group"] for row in pairs if row["split"] == "test"}
    paired = {row["image_id"] for row in pairs if row["split"] == "train"}
    free = [row["image_id"] for row in images if not row["holdout"] and row["group_id"] not in evaluated]
    ordered = sorted(free, key=lambda image_id: (image_id not in paired, image_id not in labels, image_id))
    return sorted(ordered[:at_most])


def run_evaluation(
    config: EvaluateConfig,
    agenda: EvaluationPlan,
    known: EvaluationContext,
    source: ImageGenerator,
    media: MediaShardReader,
    eyes_of: Mapping[str, feature_extractors.PictureJudge],
    ears: AiSfx,
    open_memo: feature_extractors.CacheFactory,
) -> EvaluationResult:
    """Draw every sound of the agenda, judge every set with every judge (`eyes_of`: picture judges by name; `ears`)."""
    heard = [render(tracks, media.sound) for tracks in agenda.tracks]
    log.info("drawing %d samples of each of %d sounds", config.samples_per_sound, len(heard))
    drawn = source.draw(heard, config.samples_per_sound, config.seed)
    unconditional = source.unconditional(config.unconditional_samples, config.seed + 1)
    texts = sorted(set(known.texts.values())) if source.has_text_encoder else []
    spoken = source.generate_from_text(texts, config.samples_per_sound, config.seed) if texts else None
    ears.load()
    log.info("listening with %s", config.sound_judge)
    recipes = dict(zip((sound.key for sound in agenda.sounds), agenda.tracks, strict=True))
    recipes |= {mix_id(pair_tracks(pair)): pair_tracks(pair) for pair in known.trained}
    listener = feature_extractors.CachedFeatures(open_memo("evaluate-sound", ears.describe()), config.batch_size)
    embedded = listener.rows(sorted(recipes), lambda keys: _audio_features(ears, [recipes[key] for key in keys], media))
    computed, reused = listener.computed, listener.reused

    evaluation: Row = {"judges": {}, "warnings": []}
    outcomes: dict[str, dict[str, SetMetrics]] = {}
    wanted = {item.image_id for items in agenda.sets.values() for item in items} | set(known.reference)
    wanted |= {str(pair["image_id"]) for pair in known.trained}
    for name in config.picture_judges:
        log.info("looking with %s", name)
        eyes = eyes_of[name].load()
        description = [eyes.describe(), "square_picture", source.side]
        viewer = feature_extractors.CachedFeatures(open_memo("evaluate-picture", description), config.batch_size)
        real = viewer.rows(sorted(wanted), lambda ids, eyes=eyes: _image_features(eyes, ids, media, source.side))  # type: ignore[misc]
        computed, reused = computed + viewer.computed, reused + viewer.reused
        features = SetFeatures(
            real,
            feature_extractors.extract_generated_features(eyes, drawn),
            feature_extractors.extract_generated_features(eyes, unconditional),
            np.stack([embedded[sound.key] for sound in agenda.sounds]),
            None if spoken is None else feature_extractors.extract_generated_features(eyes, spoken),
            {name: texts.index(text) for name, text in known.texts.items()} if texts else {},
        )
        settings = _settings(config, name, source)
        outcomes[name], evaluation["judges"][name], space = _judge(config, agenda, known, features, embedded, settings)
        evaluation["judges"][name] |= {"family": eyes.family, **getattr(eyes, "identity", {})}
        if name == config.picture_judges[0] and config.sensitivity_sounds and config.sensitivity_gains_db:
            evaluation["sensitivity"] = _sensitivity(config, source, agenda, heard, eyes, space, settings)
    evaluation["warnings"] += _ais_warnings(config, known, evaluation["judges"])
    evaluation["judges"][config.sound_judge] = {"family": ears.family}
    for key, items in agenda.sets.items():
        blocks = [found[key] for found in outcomes.values() if key in found]
        if blocks:
            merged: dict[str, Row] = {}
            for block in blocks:
                for row, metrics in block.rows.items():
                    merged.setdefault(row, {}).update(metrics)
            independent = len({agenda.sounds[item.sound].group for item in items})
            evaluation[key] = {
                "n_pairs": len(items),
                "n_sounds": len({item.sound for item in items}),
                "too_small_to_rank": independent < config.small_sample,
                "rows": merged,
            }
            # Several judges say the same of the number of sounds: once is enough.
            evaluation["warnings"] += dict.fromkeys(text for block in blocks for text in block.warnings)
    first = outcomes[config.picture_judges[0]]
    draws = {f"{key}/{name}": kept for found in outcomes.values() for key in found for name, kept in found[key].draws.items()}
    return EvaluationResult(evaluation, first, _merge_items(outcomes), draws, drawn, unconditional, computed, reused)


def _judge(
    config: EvaluateConfig,
    agenda: EvaluationPlan,
    known: EvaluationContext,
    features: SetFeatures,
    embedded: Mapping[str, DoubleArray],
    settings: MetricSettings,
) -> tuple[dict[str, SetMetrics], Row, whitened_space.WhitenedFeatureSpace]:
    """Calibrate one picture judge on real pictures, fit its audio-image map, and judge every set of two or more pairs."""
    reference = np.stack([features.real[image_id] for image_id in known.reference])
    labels = [known.labels.get(image_id) for image_id in known.reference]
    space = whitened_space.fit_space(reference, labels, config.judge_shrinkage)
    facts: Row = {"space": space.kind, "reference_pictures": space.n, "reference_classes": space.classes}
    ais = None
    groups = [str(pair["audio_group"]) for pair in known.trained]
    if audio_image_regression.has_enough_groups(groups):
        ais = audio_image_regression.fit(
            np.stack([embedded[mix_id(pair_tracks(pair))] for pair in known.trained]),
            space.look(np.stack([features.real[pair["image_id"]] for pair in known.trained])),
            groups,
        )
        facts |= {
            "ais_leave_group_out_r2": round(ais.group_out_r2, 6),
            "ais_training_pairs": ais.n,
            "ais_training_sound_groups": ais.groups,
        }
    pictures = sorted({str(pair["image_id"]) for pair in known.trained})
    found = {
        key: compute_set_metrics(
            key, items, agenda.sounds, features, space, ais, known.labels, pictures, known.image_groups, settings
        )
        for key, items in agenda.sets.items()
        if len(items) > 1
    }
    return found, facts, space


def _ais_warnings(config: EvaluateConfig, known: EvaluationContext, facts: Mapping[str, Row]) -> list[str]:
    """What to know of the audio-image judges: that there is none, or that one is weak."""
    groups = [str(pair["audio_group"]) for pair in known.trained]
    if not audio_image_regression.has_enough_groups(groups):
        return [
            f"ais_winrate_{config.sound_judge}: not measured; its judge is fitted on "
            f"{audio_image_regression.MIN_PAIRS} or more training pairs of {audio_image_regression.MIN_GROUPS} or more "
            f"sound groups, and there are {len(groups)} of {len(set(groups))}"
        ]
    r2 = {name: float(facts[name]["ais_leave_group_out_r2"]) for name in config.picture_judges}
    return [
        f"ais_winrate_{config.sound_judge}_{name}: its judge is weak; on sound groups left out of the fit it foretells "
        f"{100 * value:.1f} % of the variance of the pictures' features"
        for name, value in r2.items()
        if value < audio_image_regression.WEAK_R2
    ]


def _sensitivity(
    config: EvaluateConfig,
    source: ImageGenerator,
    agenda: EvaluationPlan,
    heard: Sequence[npt.NDArray[np.float32]],
    eyes: feature_extractors.PictureJudge,
    space: whitened_space.WhitenedFeatureSpace,
    settings: MetricSettings,
) -> Row:
    """Draw some sounds again at other gains with the same noise."""
    rows = evenly_spaced_indices(len(heard), config.sensitivity_sounds)
    samples = min(SENSITIVITY_SAMPLES, config.samples_per_sound)
    looks = {}
    for gain in sorted({0.0, *config.sensitivity_gains_db}):
        scaled = [heard[row] * np.float32(10.0 ** (gain / 20.0)) for row in rows]
        looks[gain] = space.look(feature_extractors.extract_generated_features(eyes, source.draw(scaled, samples, config.seed)))
    groups = [agenda.sounds[row].group for row in rows]
    found = gain_distances(looks, groups, config.bootstrap_repeats, config.seed)
    return {name: metric_entry(estimate, settings) for name, estimate in found.items()}


def _merge_items(outcomes: Mapping[str, Mapping[str, SetMetrics]]) -> list[Row]:
    merged: dict[tuple[str, str], Row] = {}
    for found in outcomes.values():
        for block in found.values():
            for row in block.items:
                merged.setdefault((row["set"], row["pair"]), {}).update(row)
    return [merged[key] for key in sorted(merged)]


def _settings(config: EvaluateConfig, judge: str, source: ImageGenerator) -> MetricSettings:
    return MetricSettings(
        judge,
        config.sound_judge,
        config.seed,
        config.bootstrap_repeats,
        config.density_neighbours,
        source.sample_rate_hz,
        config.small_sample,
    )


def _audio_features(ears: AiSfx, sounds: Sequence[Sequence[Track]], media: MediaShardReader) -> npt.NDArray[np.float32]:
    return np.stack(feature_extractors.map_threads(lambda tracks: ears.embed(render(tracks, media.sound)), sounds))


def _image_features(
    eyes: feature_extractors.PictureJudge, image_ids: Sequence[str], media: MediaShardReader, side: int
) -> npt.NDArray[np.float32]:
    """Features of real pictures as the model could at best have drawn them: both kinds must reach a judge through the same
    resize (clean-fid, arXiv 2104.11222)."""
    return feature_extractors.extract_image_features(
        eyes, feature_extractors.map_threads(lambda image_id: pad_to_square(media.image(image_id), side), image_ids)
    )
