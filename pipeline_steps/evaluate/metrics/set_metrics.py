"""Metrics of a set of pairs by one image judge: every row of the table, and values of single pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray, IntArray
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import EvalPair, EvaluationPlan
from pipeline_steps.evaluate.judges.audio_image_regression import AudioToImageRegressor
from pipeline_steps.evaluate.judges.whitened_space import WhitenedFeatureSpace
from pipeline_steps.evaluate.metrics.bootstrap import Estimate
from pipeline_steps.evaluate.metrics.distribution import (
    cmmd_kernel,
    density_coverage_bootstrap,
    frechet_distance,
    kid_kernel,
    median_bandwidth,
    mmd_bootstrap,
    rbf_kernel,
)
from pipeline_steps.evaluate.metrics.win_rate import win_rate_estimate
from pipeline_steps.evaluate.metrics.win_rate_rows import JudgeFeatures, shuffled_partners, win_rates_per_pair

Row = dict[str, Any]

MMD_SCALE = 1000.0
"""CMMD is published times 1000; so is every distance with an RBF kernel here."""
TEXT_ROWS = ("text_oracle", "caption_route")
"""Rows of images that are generated from text."""
LOOKUP_ROWS = ("nearest_training_image", "model_minus_nearest_training_image")
"""Rows of the lookup baseline."""
ROWS = ("model", "shuffled_audio", "unconditional", "real_images", *TEXT_ROWS, *LOOKUP_ROWS)
"""Rows of the table of metrics."""
CMMD_JUDGE = "clip"
"""Judge on whose features CMMD is defined; with other judges the metric is `mmd_rbf_<judge>`."""


@dataclass(frozen=True, slots=True)
class SetFeatures:
    """Raw features of an image judge, and those of the audio judge.

    Attributes:
        real: image id -> [D], real images at the resolution of the model.
        generated: [M, S, D] samples of each clip.
        unconditional: [U, D] samples without audio.
        audio: [M, D_a] embedding of each clip by the audio judge.
        text_generated: [T, S, D] samples of each text; None if the model has no text encoder.
        text_rows: name of a pair -> row of `text_generated`; pairs without a text are absent.
        caption_rows: [M] row of `text_generated` of the caption of each clip; None without an audio tagger.
        nearest_training: ids of the nearest training images of each of the M clips.
    """

    real: Mapping[str, DoubleArray]
    generated: DoubleArray
    unconditional: DoubleArray
    audio: DoubleArray
    text_generated: DoubleArray | None = None
    text_rows: Mapping[str, int] = field(default_factory=dict)
    caption_rows: IntArray | None = None
    nearest_training: Sequence[Sequence[str]] = ()

    def images(self, image_ids: Sequence[str]) -> DoubleArray:
        """Features [N, D] of real images."""
        return np.stack([self.real[image_id] for image_id in image_ids])

    def text_index(self, pairs: Sequence[EvalPair]) -> IntArray:
        """Row of `text_generated` of each pair, -1 if it has no text."""
        return np.array([self.text_rows.get(pair.name, -1) for pair in pairs], np.int64)


@dataclass(frozen=True, slots=True)
class SetMetrics:
    """Results of one set.

    Attributes:
        rows: row of the table -> metric -> entry of `evaluation.json`.
        pairs: values of single pairs, for `per_pair.csv`.
        partner: `shuffled_partners` of the set.
        warnings: sentences for the report.
        bootstrap: metric -> bootstrap values [B] of the model row, for metrics without a value per pair. Models that are
            evaluated on the same data with the same seed have paired values.
    """

    rows: dict[str, Row]
    pairs: list[Row]
    partner: IntArray
    warnings: list[str]
    bootstrap: dict[str, DoubleArray]


def metric_entry(estimate: Estimate, judge: str, seed: int, sample_rate_hz: int, **more: Any) -> Row:
    """Entry of `evaluation.json`: a value with its interval and the conditions that make values comparable."""
    return {**estimate.entry(), "judge": judge, "seed": seed, "sample_rate_hz": sample_rate_hz, **more}


def not_applicable(reason: str) -> Row:
    """Entry of `evaluation.json` without a value."""
    return {"value": None, "reason": reason}


@dataclass(frozen=True, slots=True)
class SetEvaluator:
    """Computes the metrics of the sets of a plan by one image judge.

    Attributes:
        config: the section `evaluate`.
        judge: name of the image judge.
        sample_rate_hz: sample rate of the model's audio encoder.
        plan: pairs and clips.
        features: of the judge.
        space: feature space for similarities.
        regressor: predicts image features from audio; None if there are too few training pairs to fit it.
    """

    config: EvaluateConfig
    judge: str
    sample_rate_hz: int
    plan: EvaluationPlan
    features: SetFeatures
    space: WhitenedFeatureSpace
    regressor: AudioToImageRegressor | None

    def evaluate(self, name: str) -> SetMetrics:
        """All metrics of set `name`."""
        pairs, clips, config = self.plan.sets[name], self.plan.clips, self.config
        rows: dict[str, Row] = {row: {} for row in ROWS}
        if self.features.text_generated is None:
            reason = "the model has no text encoder"
            rows |= {row: {"applicable": False, "reason": reason} for row in TEXT_ROWS}
        elif self.features.caption_rows is None:
            reason = "YAMNet, whose tags caption the clips, is neither in the model nor in data/assets"
            rows["caption_route"] = {"applicable": False, "reason": reason}
        if not any(self.features.nearest_training):
            reason = "no training sound has an embedding"
            rows |= {row: {"applicable": False, "reason": reason} for row in LOOKUP_ROWS}
        per_pair: list[Row] = [
            {
                "set": name,
                "pair": pair.name,
                "image_id": pair.image_id,
                "sound": clips[pair.clip].key,
                "cluster": clips[pair.clip].group,
            }
            for pair in pairs
        ]
        clusters = [clips[pair.clip].group for pair in pairs]
        projected = {f"win_rate_{self.judge}": self._image_targets(pairs)}
        if self.regressor is not None:
            projected[f"ais_win_rate_{config.audio_judge}_{self.judge}"] = self._audio_targets(pairs, self.regressor)
        for metric, features in projected.items():
            for row, rates in win_rates_per_pair(features, clips, pairs).items():
                estimate = win_rate_estimate(rates, clusters, config.num_bootstrap, config.seed)
                rows[row][metric] = self.entry(estimate) if estimate else not_applicable("no pair has candidate and negative")
                for values, rate in zip(per_pair, rates, strict=True):
                    values[f"{metric}.{row}"] = None if np.isnan(rate) else round(float(rate), 6)
        bootstrap = self._add_distribution_metrics(rows, pairs)
        return SetMetrics(
            rows, per_pair, shuffled_partners(clips, pairs, config.seed), self._warnings(name, len(set(clusters))), bootstrap
        )

    def entry(self, estimate: Estimate, **more: Any) -> Row:
        """`metric_entry` under the conditions of this evaluation."""
        return metric_entry(estimate, self.judge, self.config.seed, self.sample_rate_hz, **more)

    def _warnings(self, name: str, num_clusters: int) -> list[str]:
        pairs, dimensions = len(self.plan.sets[name]), self.features.generated.shape[-1]
        warnings = []
        if num_clusters < self.config.min_clusters:
            warnings.append(
                f"{name}: {pairs} pairs with {num_clusters} independent sounds, fewer than {self.config.min_clusters}; "
                "do not rank models by this set"
            )
        if pairs <= dimensions:
            warnings.append(
                f"{name}: fd_{self.judge} is computed from {pairs} real images in {dimensions} dimensions; "
                "it is biased upwards and comparable only at the same N"
            )
        return warnings

    def _training_images(self) -> list[str]:
        return sorted({str(pair["image_id"]) for pair in self.plan.training_pairs})

    def _image_targets(self, pairs: Sequence[EvalPair]) -> JudgeFeatures:
        """The target of a pair is its real image; its positives are other real images of the same class."""
        labels, groups = self.plan.labels, self.plan.image_groups
        pool = sorted({*(pair.image_id for pair in pairs), *self._training_images()})
        row_of = {image_id: row for row, image_id in enumerate(pool)}
        positives = []
        for pair in pairs:
            label = labels.get(pair.image_id)
            same_class = [
                row
                for image_id, row in row_of.items()
                if label is not None and labels.get(image_id) == label and groups[image_id] != pair.image_group
            ]
            positives.append(np.array(same_class, np.int64))
        real = self.space.project(self.features.images(pool))
        return self._judge_features(
            pairs,
            real[[row_of[pair.image_id] for pair in pairs]],
            real,
            positives,
            self._negative_images(pairs, row_of, labels),
        )

    def _audio_targets(self, pairs: Sequence[EvalPair], regressor: AudioToImageRegressor) -> JudgeFeatures:
        """The target of a pair is the prediction from its audio; its positive is its own real image."""
        row_of = {pair.image_id: row for row, pair in enumerate(pairs)}
        targets = regressor.predict(self.features.audio[[pair.clip for pair in pairs]])
        real = regressor.project(self.space.project(self.features.images([pair.image_id for pair in pairs])))
        positives = [np.array([row], np.int64) for row in range(len(pairs))]
        return self._judge_features(pairs, targets, real, positives, self._negative_images(pairs, row_of, {}), regressor)

    def _judge_features(
        self,
        pairs: Sequence[EvalPair],
        targets: DoubleArray,
        real: DoubleArray,
        positives: Sequence[IntArray],
        negatives: Sequence[IntArray],
        regressor: AudioToImageRegressor | None = None,
    ) -> JudgeFeatures:
        def project(features: npt.ArrayLike) -> DoubleArray:
            rows = self.space.project(features)
            return rows if regressor is None else regressor.project(rows)

        found = self.features
        return JudgeFeatures(
            targets,
            project(found.generated),
            project(found.unconditional),
            real,
            positives,
            negatives,
            None if found.text_generated is None else project(found.text_generated),
            found.text_index(pairs),
            found.caption_rows,
            self._nearest_training(project),
        )

    def _nearest_training(self, project: Callable[[npt.ArrayLike], DoubleArray]) -> DoubleArray | None:
        """Nearest training images [M, T, K] of each clip, padded with NaN; None if there is none."""
        nearest_training = self.features.nearest_training
        ids = sorted({image_id for images in nearest_training for image_id in images})
        if not ids:
            return None
        rows = dict(zip(ids, project(self.features.images(ids)), strict=True))
        padded = np.full((len(nearest_training), max(map(len, nearest_training)), len(rows[ids[0]])), np.nan)
        for clip, images in enumerate(nearest_training):
            for place, image_id in enumerate(images):
                padded[clip, place] = rows[image_id]
        return padded

    def _negative_images(
        self, pairs: Sequence[EvalPair], row_of: Mapping[str, int], labels: Mapping[str, str]
    ) -> list[IntArray]:
        """Rows of the images of negative clips of each pair: another group and class of audio, and (by `labels`) of image."""
        clips = self.plan.clips
        negatives = []
        for pair in pairs:
            own, label = clips[pair.clip], labels.get(pair.image_id)
            rows = {
                row_of[other.image_id]
                for other in pairs
                if clips[other.clip].group != own.group
                and (own.label is None or clips[other.clip].label != own.label)
                and (label is None or labels.get(other.image_id) != label)
                and other.image_group != pair.image_group
            }
            negatives.append(np.array(sorted(rows), np.int64))
        return negatives

    def _distributions(self, pairs: Sequence[EvalPair], image_ids: set[str]) -> dict[str, tuple[DoubleArray, list[str]]]:
        """Features [N, D] and cluster of each image, by row of the table."""
        found, clips = self.features, self.plan.clips
        generated, dimensions = found.generated, found.generated.shape[-1]
        used = sorted({pair.clip for pair in pairs})
        rows = {
            "model": (
                generated[used].reshape(-1, dimensions),
                [clips[clip].key for clip in used for _ in range(generated.shape[1])],
            ),
            "unconditional": (found.unconditional, [f"u{row}" for row in range(len(found.unconditional))]),
        }
        if found.text_generated is not None:
            texts = sorted(set(found.text_index(pairs).tolist()) - {-1})
            clusters = [f"t{row}" for row in texts for _ in range(found.text_generated.shape[1])]
            rows["text_oracle"] = (found.text_generated[texts].reshape(-1, dimensions), clusters)
        others = [image_id for image_id in self._training_images() if image_id not in image_ids]
        if others:
            rows["real_images"] = (found.images(others), [self.plan.image_groups[image_id] for image_id in others])
        return rows

    def _add_distribution_metrics(self, rows: dict[str, Row], pairs: Sequence[EvalPair]) -> dict[str, DoubleArray]:
        """Add KID, MMD, Frechet distance, density and coverage to each row, all against the real images of the set.

        Returns:
            Bootstrap values of the model row by metric.
        """
        judge, num_bootstrap, seed, k = self.judge, self.config.num_bootstrap, self.config.seed, self.config.density_k
        ids = sorted({pair.image_id for pair in pairs})
        real = self.features.images(ids)
        real_clusters = [self.plan.image_groups[image_id] for image_id in ids]
        is_cmmd = judge == CMMD_JUDGE
        kid, fd, density, coverage = (f"{metric}_{judge}" for metric in ("kid", "fd", "density", "coverage"))
        mmd = f"cmmd_{judge}" if is_cmmd else f"mmd_rbf_{judge}"
        kernels = {
            kid: (kid_kernel, 1.0),
            mmd: (cmmd_kernel if is_cmmd else rbf_kernel(median_bandwidth(real)), MMD_SCALE),
        }
        model: dict[str, DoubleArray] = {}
        for row, (images, clusters) in self._distributions(pairs, set(ids)).items():
            entries: Row = {}
            estimates: dict[str, tuple[Estimate, DoubleArray]] = {}
            num_clusters = len(set(clusters))
            if num_clusters > 1 and len(set(real_clusters)) > 1:
                for metric, (kernel, scale) in kernels.items():
                    estimates[metric] = mmd_bootstrap(images, real, kernel, clusters, real_clusters, num_bootstrap, seed, scale)
                    entries[metric] = self.entry(estimates[metric][0], n_real=len(real))
                distance = Estimate(frechet_distance(images, real), None, None, len(images), num_clusters)
                entries[fd] = self.entry(distance, n_real=len(real))
            else:
                entries |= {metric: not_applicable("fewer than two independent images on one side") for metric in kernels}
                entries[fd] = not_applicable("fewer than two images")
            if len(real) > k and len(images):
                estimates[density], estimates[coverage] = density_coverage_bootstrap(
                    images, real, k, clusters, real_clusters, num_bootstrap, seed
                )
                for metric in (density, coverage):
                    entries[metric] = self.entry(estimates[metric][0], n_real=len(real), neighbours=k)
            rows[row] |= entries
            if row == "model":
                model = {metric: values for metric, (estimate, values) in estimates.items() if estimate.low is not None}
        reason = "only win rates are measured for this row"
        for row in ("caption_route", *LOOKUP_ROWS):
            if "applicable" not in rows[row]:
                rows[row] |= {metric: not_applicable(reason) for metric in (*kernels, fd, density, coverage)}
        reason = "the same images as in the model row, in another order"
        rows["shuffled_audio"] |= {metric: not_applicable(reason) for metric in (*kernels, fd, density, coverage)}
        return model
