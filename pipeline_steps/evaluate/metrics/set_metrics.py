"""One set of pairs through one picture judge: every row of the table with every metric, and the values of single items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.evaluate.evaluation_plan import EvalAudio, EvalPair
from pipeline_steps.evaluate.judges.audio_image_regression import AudioToImageRegressor
from pipeline_steps.evaluate.judges.whitened_space import WhitenedFeatureSpace
from pipeline_steps.evaluate.metrics.bootstrap import Estimate
from pipeline_steps.evaluate.metrics.distribution import (
    cmmd_kernel,
    density_coverage_draws,
    frechet_distance,
    median_bandwidth,
    mmd_draws,
    polynomial_kernel,
    rbf_kernel,
)
from pipeline_steps.evaluate.metrics.win_rate import win_rate_estimate
from pipeline_steps.evaluate.metrics.win_rate_rows import JudgeFeatures, shuffled_partners, win_rates_per_pair

Row = dict[str, Any]

CMMD_SCALE = 1000.0
"""CMMD is published times 1000; so is ours."""
CMMD_JUDGE = "clip"
"""The judge on whose features CMMD is defined; with any other the metric is called `cmmd_style_`."""

NO_TEXT_ORACLE = {
    "applicable": False,
    "reason": "the model reads no text, so there is no picture drawn from a caption to compare with",
}


@dataclass(frozen=True, slots=True)
class MetricSettings:
    """What every number of the table shares; it is printed beside each of them."""

    judge: str
    sound_judge: str
    seed: int
    repeats: int
    neighbours: int
    sample_rate_hz: int
    small_sample: int


@dataclass(frozen=True, slots=True)
class SetFeatures:
    """Raw features of a picture judge.

    Attributes:
        real: image id -> [D], real pictures at the model's resolution.
        drawn: [M, S, D], samples of each sound.
        unconditional: [U, D].
        sounds: [M, D_a], the sound judge's embedding of each drawn sound.
        spoken: [T, S, D], samples drawn from each text; None where the model reads no text.
        text_of: item name -> row of `spoken`, for the items whose picture the captioner had words for.
    """

    real: Mapping[str, DoubleArray]
    drawn: DoubleArray
    unconditional: DoubleArray
    sounds: DoubleArray
    spoken: DoubleArray | None = None
    text_of: Mapping[str, int] = field(default_factory=dict)

    def texts(self, items: Sequence[EvalPair]) -> npt.NDArray[np.int64]:
        """Row of `spoken` of each item, -1 where there is none."""
        return np.array([self.text_of.get(item.name, -1) for item in items], np.int64)


@dataclass(frozen=True, slots=True)
class SetMetrics:
    """Rows of the table (row name -> metric -> entry), per-item values, whose drawings are shown beside whose, and warnings.

    `draws`: metric -> bootstrap draws [repeats] of the model's row, for metrics without a value per item. Models judged on
    the same data with the same seed are resampled alike, so the difference of their draws is a paired bootstrap.
    """

    rows: dict[str, Row]
    items: list[Row]
    partner: npt.NDArray[np.int64]
    warnings: list[str] = field(default_factory=list)
    draws: dict[str, DoubleArray] = field(default_factory=dict)


def compute_set_metrics(
    name: str,
    items: Sequence[EvalPair],
    sounds: Sequence[EvalAudio],
    features: SetFeatures,
    space: WhitenedFeatureSpace,
    ais: AudioToImageRegressor | None,
    picture_labels: Mapping[str, str],
    reference: Sequence[str],
    image_groups: Mapping[str, str],
    settings: MetricSettings,
) -> SetMetrics:
    """Every metric of one set; `reference` are ids of training pictures, for the ground-truth distances.

    Metrics that do not exist for a row (a distance of shuffled audio: it is the same set of pictures in another order) are
    entries that say so.
    """
    partner = shuffled_partners(sounds, items, settings.seed)
    rows: dict[str, Row] = {row: {} for row in ("model", "shuffled_audio", "unconditional", "ground_truth")}
    rows["text_oracle"] = dict(NO_TEXT_ORACLE) if features.spoken is None else {}
    warnings: list[str] = []
    clusters = [sounds[item.sound].group for item in items]
    pool = sorted({*(item.image_id for item in items), *reference})
    details: list[Row] = [
        {
            "set": name,
            "pair": item.name,
            "image_id": item.image_id,
            "sound": sounds[item.sound].key,
            "cluster": sounds[item.sound].group,
        }
        for item in items
    ]

    looks = {f"win_rate_{settings.judge}": _image_targets(items, sounds, features, space, picture_labels, pool, image_groups)}
    if ais is not None:
        looks[f"ais_winrate_{settings.sound_judge}_{settings.judge}"] = _audio_targets(items, sounds, features, space, ais)
    for metric, seen in looks.items():
        for row, rates in win_rates_per_pair(seen, sounds, items).items():
            estimate = win_rate_estimate(rates, clusters, settings.repeats, settings.seed)
            rows[row][metric] = (
                metric_entry(estimate, settings) if estimate else not_applicable("no item has a rival and a candidate")
            )
            for detail, rate in zip(details, rates, strict=True):
                detail[f"{metric}.{row}"] = None if np.isnan(rate) else round(float(rate), 6)
    draws = add_distribution_metrics(rows, items, sounds, features, reference, image_groups, settings)
    count = len(set(clusters))
    if count < settings.small_sample:
        warnings.append(
            f"{name}: {len(items)} pairs with {count} independent sounds; fewer than {settings.small_sample}: "
            "read the intervals, do not rank models on it"
        )
    if len(items) <= features.drawn.shape[-1]:
        warnings.append(
            f"{name}: frechet_{settings.judge} rests on {len(items)} real pictures in {features.drawn.shape[-1]} dimensions; "
            "it is biased upwards and comparable only at the same N"
        )
    return SetMetrics(rows, details, partner, warnings, draws)


def _image_targets(
    items: Sequence[EvalPair],
    sounds: Sequence[EvalAudio],
    features: SetFeatures,
    space: WhitenedFeatureSpace,
    labels: Mapping[str, str],
    pool: Sequence[str],
    image_groups: Mapping[str, str],
) -> JudgeFeatures:
    """An item asks for its real picture; right answers are other real pictures of that picture's class."""
    real = space.look(np.stack([features.real[image_id] for image_id in pool]))
    row_of = {image_id: row for row, image_id in enumerate(pool)}
    own, rival = [], []
    for item in items:
        label = labels.get(item.image_id)
        own.append(
            np.array(
                [
                    row
                    for image_id, row in row_of.items()
                    if label is not None and labels.get(image_id) == label and image_groups[image_id] != item.image_group
                ],
                np.int64,
            )
        )
        rival.append(_rival_pictures(item, items, sounds, row_of, labels))
    asked = real[[row_of[item.image_id] for item in items]]
    spoken = None if features.spoken is None else space.look(features.spoken)
    unconditional = space.look(features.unconditional)
    return JudgeFeatures(asked, space.look(features.drawn), unconditional, real, own, rival, spoken, features.texts(items))


def _audio_targets(
    items: Sequence[EvalPair],
    sounds: Sequence[EvalAudio],
    features: SetFeatures,
    space: WhitenedFeatureSpace,
    ais: AudioToImageRegressor,
) -> JudgeFeatures:
    """An item asks for what the audio-image judge foretells from its sound; the right answer is its own real picture."""

    def look(rows: npt.ArrayLike) -> DoubleArray:
        return ais.look(space.look(rows))

    real = look(np.stack([features.real[item.image_id] for item in items]))
    row_of = {item.image_id: row for row, item in enumerate(items)}
    own = [np.array([row], np.int64) for row in range(len(items))]
    rival = [_rival_pictures(item, items, sounds, row_of, {}) for item in items]
    asked = ais.predict(features.sounds[[item.sound for item in items]])
    spoken = None if features.spoken is None else look(features.spoken)
    return JudgeFeatures(
        asked, look(features.drawn), look(features.unconditional), real, own, rival, spoken, features.texts(items)
    )


def _rival_pictures(
    item: EvalPair, items: Sequence[EvalPair], sounds: Sequence[EvalAudio], row_of: Mapping[str, int], labels: Mapping[str, str]
) -> npt.NDArray[np.int64]:
    """Rows of the real pictures of rival sounds: another group and class of sound, and (by `labels`) of picture."""
    me, label = sounds[item.sound], labels.get(item.image_id)
    rows = {
        row_of[other.image_id]
        for other in items
        if sounds[other.sound].group != me.group
        and (me.label is None or sounds[other.sound].label != me.label)
        and (label is None or labels.get(other.image_id) != label)
        and other.image_group != item.image_group
    }
    return np.array(sorted(rows), np.int64)


def add_distribution_metrics(
    rows: dict[str, Row],
    items: Sequence[EvalPair],
    sounds: Sequence[EvalAudio],
    features: SetFeatures,
    reference: Sequence[str],
    image_groups: Mapping[str, str],
    settings: MetricSettings,
) -> dict[str, DoubleArray]:
    """Fill in KID, CMMD-style distance, Frechet distance, density and coverage of each row, all against the real pictures.

    Returns the bootstrap draws of the model's row, metric -> [repeats].
    """
    judge = settings.judge
    ids = sorted({item.image_id for item in items})
    real = np.stack([features.real[image_id] for image_id in ids])
    real_clusters = [image_groups[image_id] for image_id in ids]
    used = sorted({item.sound for item in items})
    samples = features.drawn.shape[1]
    drawn = {
        "model": (features.drawn[used].reshape(-1, real.shape[1]), [sounds[row].key for row in used for _ in range(samples)]),
        "unconditional": (features.unconditional, [f"u{row}" for row in range(len(features.unconditional))]),
    }
    if features.spoken is not None:
        texts = sorted(set(features.texts(items).tolist()) - {-1})
        clusters_of_texts = [f"t{row}" for row in texts for _ in range(features.spoken.shape[1])]
        drawn["text_oracle"] = (features.spoken[texts].reshape(-1, real.shape[1]), clusters_of_texts)
    others = [image_id for image_id in reference if image_id not in set(ids)]
    if others:
        rows_of_reference = np.stack([features.real[image_id] for image_id in others])
        drawn["ground_truth"] = (rows_of_reference, [image_groups[image_id] for image_id in others])
    cmmd = f"cmmd_{judge}" if judge == CMMD_JUDGE else f"cmmd_style_{judge}"
    names = [f"kid_{judge}", cmmd, f"frechet_{judge}", f"density_{judge}", f"coverage_{judge}"]
    gaussian = cmmd_kernel if judge == CMMD_JUDGE else rbf_kernel(median_bandwidth(real))
    kernels = {names[0]: (polynomial_kernel, 1.0), names[1]: (gaussian, CMMD_SCALE)}
    kept: dict[str, DoubleArray] = {}
    for row, (pictures, clusters) in drawn.items():
        found: dict[str, tuple[Estimate, DoubleArray]] = {}
        enough = len(set(clusters)) > 1 and len(set(real_clusters)) > 1
        for name, (kernel, scale) in kernels.items():
            if enough:
                found[name] = mmd_draws(pictures, real, kernel, clusters, real_clusters, settings.repeats, settings.seed, scale)
                rows[row][name] = metric_entry(found[name][0], settings, n_real=len(real))
            else:
                rows[row][name] = not_applicable("fewer than two independent pictures on one side")
        bare = Estimate(frechet_distance(pictures, real), None, None, len(pictures), len(set(clusters))) if enough else None
        rows[row][names[2]] = (
            metric_entry(bare, settings, n_real=len(real)) if bare else not_applicable("fewer than two pictures")
        )
        if len(real) > settings.neighbours and len(pictures):
            found[names[3]], found[names[4]] = density_coverage_draws(
                pictures, real, settings.neighbours, clusters, real_clusters, settings.repeats, settings.seed
            )
            for name in names[3:]:
                rows[row][name] = metric_entry(found[name][0], settings, n_real=len(real), neighbours=settings.neighbours)
        if row == "model":
            kept = {name: draws for name, (estimate, draws) in found.items() if estimate.low is not None}
    for name in names:
        rows["shuffled_audio"][name] = not_applicable(
            "the same pictures in another order: equal to the model's by construction"
        )
    return kept


def metric_entry(estimate: Estimate, settings: MetricSettings, **more: Any) -> Row:
    """An estimate with everything a reader needs to compare it: interval, n, clusters, judge, seed, sample rate."""
    return {
        "value": round(estimate.value, 6),
        "low": None if estimate.low is None else round(estimate.low, 6),
        "high": None if estimate.high is None else round(estimate.high, 6),
        "n": estimate.n,
        "clusters": estimate.clusters,
        "judge": settings.judge,
        "seed": settings.seed,
        "sample_rate_hz": settings.sample_rate_hz,
        **more,
    }


def not_applicable(reason: str) -> Row:
    """An entry that says why there is no number."""
    return {"value": None, "reason": reason}
