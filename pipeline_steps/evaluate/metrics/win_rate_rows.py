"""Win rates of every row of the metric table, through one judge: model and controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline_steps.core.array_types import BoolArray, DoubleArray, IntArray
from pipeline_steps.evaluate.evaluation_plan import EvalAudio, EvalPair
from pipeline_steps.evaluate.metrics.win_rate import derangement, mann_whitney_win_rate, negative_mask, win_rates


@dataclass(frozen=True, slots=True)
class JudgeFeatures:
    """Features of one set in the space of a judge, as unit rows [..., K].

    Attributes:
        targets: [N, K] what the images of each pair should resemble: its real image, or a prediction from its audio.
        generated: [M, S, K] S samples of each clip.
        unconditional: [U, K] samples without audio.
        real: [R, K] real images for the row `real_images`.
        positives: per pair, rows of `real` that match it.
        negatives: per pair, rows of `real` that belong to its negative clips.
        text_generated: [T, S, K] samples of each text; None if the model has no text encoder.
        text_index: [N] row of `text_generated` of each pair, -1 if the pair has no text.
        caption_index: [M] row of `text_generated` of the caption of each clip.
        nearest_training: [M, T, K] nearest training images of each clip, NaN where a clip has fewer than T.
    """

    targets: DoubleArray
    generated: DoubleArray
    unconditional: DoubleArray
    real: DoubleArray
    positives: Sequence[IntArray]
    negatives: Sequence[IntArray]
    text_generated: DoubleArray | None = None
    text_index: IntArray | None = None
    caption_index: IntArray | None = None
    nearest_training: DoubleArray | None = None


def negative_masks(clips: Sequence[EvalAudio], pairs: Sequence[EvalPair]) -> tuple[BoolArray, BoolArray]:
    """Negative clips of each clip [M, M] and of each pair [N, M]; only clips of `pairs` count."""
    between = negative_mask([clip.group for clip in clips], [clip.label for clip in clips])
    own = [pair.clip for pair in pairs]
    present = np.zeros(len(clips), bool)
    present[own] = True
    between &= present[None, :]
    return between, between[own]


def shuffled_partners(clips: Sequence[EvalAudio], pairs: Sequence[EvalPair], seed: int) -> IntArray:
    """Clip [M] whose samples the report shows beside those of each clip.

    The partner has another group and class, and is used once where that is possible. -1 marks clips that no pair uses and
    clips without a negative.
    """
    between, _ = negative_masks(clips, pairs)
    used = np.array(sorted({pair.clip for pair in pairs}), dtype=np.int64)
    partner = np.full(len(clips), -1, np.int64)
    found = derangement(between[np.ix_(used, used)], seed)
    partner[used] = np.where(found >= 0, used[found], -1)
    return partner


def win_rates_per_pair(
    features: JudgeFeatures, clips: Sequence[EvalAudio], pairs: Sequence[EvalPair]
) -> dict[str, DoubleArray]:
    """Win rates [N] by row of the table; NaN where a pair has none.

    - model: samples of the pair's clip against samples of its negative clips.
    - shuffled_audio: samples of a negative clip instead of its own, which becomes one of the negatives; the mean over all.
    - unconditional: samples without audio against the negatives of the model row.
    - real_images: real images on both sides.
    - text_oracle: samples of the pair's text against samples of the texts of its negative clips.
    - caption_route: the same with the tags of the audio tagger as text.
    - nearest_training_image: training images looked up by the clip against those looked up by its negative clips.
    - model_minus_nearest_training_image: difference of the two rows, pair by pair.
    """
    _, negatives = negative_masks(clips, pairs)
    own = np.array([pair.clip for pair in pairs])
    scores = np.einsum("nk,msk->nms", features.targets, features.generated)
    rates = {
        "model": win_rates(scores[np.arange(len(pairs)), own], scores, negatives),
        "shuffled_audio": _shuffled_rates(scores, negatives, own),
        "unconditional": win_rates(features.targets @ features.unconditional.T, scores, negatives),
        "real_images": _real_rates(features),
    }
    if features.text_generated is not None and features.text_index is not None:
        rates["text_oracle"] = _text_rates(features.targets, features.text_generated, features.text_index, negatives[:, own])
    if features.text_generated is not None and features.caption_index is not None:
        captions = features.caption_index[own]
        rates["caption_route"] = _text_rates(features.targets, features.text_generated, captions, negatives[:, own])
    if features.nearest_training is not None:
        scores = np.einsum("nk,mtk->nmt", features.targets, features.nearest_training)
        rates["nearest_training_image"] = win_rates(scores[np.arange(len(pairs)), own], scores, negatives)
        rates["model_minus_nearest_training_image"] = rates["model"] - rates["nearest_training_image"]
    return rates


def _shuffled_rates(scores: DoubleArray, negatives: BoolArray, own: IntArray) -> DoubleArray:
    """Win rates [N] of shuffled audio: the exact mean over all negative clips, so that it does not depend on one derangement.

    With w the model's rate of a pair and R negatives the value is 1/2 + (1/2 - w) / R: the negatives win half of the
    comparisons among themselves, and only comparisons with the pair's own clip differ from that.
    """
    rates = np.full(len(own), np.nan)
    for pair, others in enumerate(negatives):
        count = int(others.sum())
        if count:
            with_own = others.copy()
            with_own[own[pair]] = True
            rate = mann_whitney_win_rate(scores[pair, others].ravel(), scores[pair, with_own].ravel())
            rates[pair] = ((count + 1) * rate - 0.5) / count  # removes the comparisons of a clip with itself, won by half
    return rates


def _text_rates(targets: DoubleArray, generated: DoubleArray, text_index: IntArray, negatives: BoolArray) -> DoubleArray:
    """Win rates [N]; `negatives` [N, N] marks pairs with negative clips. A pair with the same text is no negative."""
    scores = np.einsum("nk,tsk->nts", targets, generated)
    rates = np.full(len(text_index), np.nan)
    for pair, own in enumerate(text_index):
        others = np.setdiff1d(text_index[negatives[pair]], [own, -1])
        if own >= 0 and len(others):
            rates[pair] = mann_whitney_win_rate(scores[pair, own], scores[pair, others].ravel())
    return rates


def _real_rates(features: JudgeFeatures) -> DoubleArray:
    scores = features.targets @ features.real.T
    rates = np.full(len(scores), np.nan)
    for pair, (positives, negatives) in enumerate(zip(features.positives, features.negatives, strict=True)):
        if len(positives) and len(negatives):
            rates[pair] = mann_whitney_win_rate(scores[pair, positives], scores[pair, negatives])
    return rates
