"""Memorisation: distance of generated images to the training images, diversity of the samples of a clip. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import ByteArray, DoubleArray, IntArray
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.evaluation_plan import EvaluationPlan
from pipeline_steps.evaluate.metrics.bootstrap import Estimate, mean_estimate
from pipeline_steps.evaluate.metrics.set_metrics import metric_entry

COPY_RMSE = 25.0
"""Gray levels (0..255, root mean square over pixels and channels) within which an image counts as a copy."""
ALIKE_RMSE = 20.0
"""Gray levels within which two samples of a clip count as the same image."""
CHUNK_VALUES = 50_000_000
"""Pixel values held as floats at a time."""


@dataclass(frozen=True, slots=True)
class NearestImages:
    """Nearest training image of each image: RMSE [N] in gray levels, and its index [N]."""

    rmse: DoubleArray
    index: IntArray


def nearest_images(images: ByteArray, references: Iterable[ByteArray]) -> NearestImages:
    """Nearest of the reference images [H, W, 3] to each image uint8 [N, H, W, 3]; references are read once, in order.

    Raises:
        ValueError: there is no reference.
    """
    rows = images.reshape(len(images), -1)
    best, index = np.full(len(rows), np.inf), np.full(len(rows), -1, np.int64)
    held = max(1, CHUNK_VALUES // max(1, rows.shape[1]))
    batch: list[ByteArray] = []
    start = 0

    def compare() -> None:
        nonlocal start
        targets = _centered(np.stack(batch).reshape(len(batch), -1))
        for first in range(0, len(rows), held):
            part = slice(first, first + held)
            squared = _mean_squares(_centered(rows[part]), targets)
            nearest = squared.argmin(1)
            value = squared[np.arange(len(squared)), nearest]
            closer = value < best[part]
            best[part] = np.where(closer, value, best[part])
            index[part] = np.where(closer, start + nearest, index[part])
        start += len(batch)
        batch.clear()

    for reference in references:
        batch.append(reference)
        if len(batch) == held:
            compare()
    if batch:
        compare()
    if not start:
        raise ValueError("there is no reference image")
    return NearestImages(np.sqrt(best), index)


def distinct_samples(samples: ByteArray) -> bool:
    """Whether no two of the samples uint8 [S, H, W, 3] of a clip are within `ALIKE_RMSE`."""
    rows = _centered(samples.reshape(len(samples), -1))
    squared = _mean_squares(rows, rows)[np.triu_indices(len(rows), 1)]
    return bool((np.sqrt(squared) > ALIKE_RMSE).all())


def memorisation_estimates(
    nearest: NearestImages, clusters: Sequence[str], num_references: int, num_bootstrap: int, seed: int
) -> dict[str, Estimate]:
    """Mean distance, fraction of copies, and fraction of the training images that are the nearest one of some image.

    Args:
        nearest: training image of each of N images.
        clusters: cluster of each image.
        num_references: training images that were compared.
        num_bootstrap: bootstrap resamples.
        seed: of the resampling.
    """
    recalled = len(set(nearest.index.tolist())) / num_references
    return {
        "nearest_rmse": mean_estimate(nearest.rmse, clusters, num_bootstrap, seed),
        "copy_fraction": mean_estimate((nearest.rmse <= COPY_RMSE).astype(np.float64), clusters, num_bootstrap, seed),
        # A resample holds fewer distinct images than the set by construction, so a percentile interval would be wrong.
        "recalled_fraction": Estimate(recalled, None, None, len(nearest.rmse), len(set(clusters))),
    }


def memorisation_block(
    plan: EvaluationPlan,
    generated: ByteArray,
    load_image: Callable[[str], ByteArray],
    config: EvaluateConfig,
    sample_rate_hz: int,
) -> dict[str, Any] | None:
    """Block `memorisation` of `evaluation.json`; None if there is no training pair.

    The row `held_out_images` has the distances of the real images of the set, which the model cannot have copied.

    Args:
        plan: pairs and clips.
        generated: uint8 [M, S, side, side, 3] samples of each clip of the plan.
        load_image: reads a real image by id as uint8 [side, side, 3], padded and resized as for training.
        config: the section `evaluate`.
        sample_rate_hz: sample rate of the model's audio encoder.
    """
    training = sorted({str(pair["image_id"]) for pair in plan.training_pairs})
    if not training:
        return None
    chosen = training
    if len(training) > config.memorisation_images:
        rng = np.random.default_rng(config.seed)
        chosen = sorted(rng.choice(training, config.memorisation_images, replace=False).tolist())
    used = {key: plan.clips_of(key) for key, pairs in plan.sets.items() if pairs}
    real = {key: list({pair.image_id: pair for pair in plan.sets[key]}.values()) for key in used}
    clips = sorted({clip for found in used.values() for clip in found})
    held_out = sorted({pair.image_id for pairs in real.values() for pair in pairs})
    samples = generated.shape[1]
    images = [generated[clips].reshape(-1, *generated.shape[2:]), np.stack([load_image(image_id) for image_id in held_out])]
    nearest = nearest_images(np.concatenate(images), map(load_image, chosen))
    distinct = {clip: distinct_samples(generated[clip]) for clip in clips} if samples > 1 else {}

    def entries(rows: Sequence[int], clusters: Sequence[str]) -> dict[str, Any]:
        found = NearestImages(nearest.rmse[list(rows)], nearest.index[list(rows)])
        estimates = memorisation_estimates(found, clusters, len(chosen), config.num_bootstrap, config.seed)
        return {name: entry(estimate) for name, estimate in estimates.items()}

    def entry(estimate: Estimate) -> dict[str, Any]:
        return metric_entry(estimate, "pixels", config.seed, sample_rate_hz)

    sets = {}
    for key, found in used.items():
        rows = [clips.index(clip) * samples + sample for clip in found for sample in range(samples)]
        groups = [plan.clips[clip].group for clip in found]
        model = entries(rows, [group for group in groups for _ in range(samples)])
        if distinct:
            values = [float(distinct[clip]) for clip in found]
            model["diverse_fraction"] = entry(mean_estimate(values, groups, config.num_bootstrap, config.seed))
        rows = [len(images[0]) + held_out.index(pair.image_id) for pair in real[key]]
        sets[key] = {"model": model, "held_out_images": entries(rows, [plan.clips[pair.clip].group for pair in real[key]])}
    return {
        "training_images": len(training),
        "compared_images": len(chosen),
        "copy_rmse": COPY_RMSE,
        "alike_rmse": ALIKE_RMSE,
        "sets": sets,
    }


def _centered(rows: ByteArray) -> np.ndarray:
    return rows.astype(np.float32) - np.float32(127.5)


def _mean_squares(x: np.ndarray, y: np.ndarray) -> DoubleArray:
    """Mean squared differences [N, M] of rows of pixels."""
    cross = (x**2).sum(1, dtype=np.float64)[:, None] + (y**2).sum(1, dtype=np.float64)[None, :] - 2.0 * (x @ y.T)
    return np.asarray(np.maximum(cross, 0.0) / x.shape[1])
