"""The rows of the table: model, shuffled audio, unconditional, ground truth and text oracle, through one and the same judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray, IntArray
from pipeline_steps.evaluate.evaluation_plan import EvalAudio, EvalPair
from pipeline_steps.evaluate.metrics.win_rate import derangement, item_win_rates, mann_whitney_win_rate, negative_mask


@dataclass(frozen=True, slots=True)
class JudgeFeatures:
    """What a judge sees, as unit rows of its space (K numbers each).

    Attributes:
        asked: [N, K] what each item asks for: its real picture, or what an audio-image judge foretells from its sound.
        drawn: [M, S, K] samples of each sound.
        unconditional: [U, K] samples without a sound.
        real: [R, K] real pictures that may stand for the ground truth.
        own_real: per item, rows of `real` that are a right answer to it (another picture of the class, or its own).
        rival_real: per item, rows of `real` that belong to rival sounds.
        spoken: [T, S, K] samples of each text; None where the model reads no text.
        text: [N] row of `spoken` of each item, -1 where its picture has no words.
    """

    asked: DoubleArray
    drawn: DoubleArray
    unconditional: DoubleArray
    real: DoubleArray
    own_real: Sequence[IntArray]
    rival_real: Sequence[IntArray]
    spoken: DoubleArray | None = None
    text: IntArray | None = None


def negative_masks(
    sounds: Sequence[EvalAudio], items: Sequence[EvalPair]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which sounds are rivals of which sound [M, M] and of which item [N, M]; only sounds of the items themselves count."""
    between = negative_mask([sound.group for sound in sounds], [sound.label for sound in sounds])
    present = np.zeros(len(sounds), bool)
    present[[item.sound for item in items]] = True
    between &= present[None, :]
    return between, between[[item.sound for item in items]]


def shuffled_partners(sounds: Sequence[EvalAudio], items: Sequence[EvalPair], seed: int) -> IntArray:
    """For each sound one whose samples are shown beside its own: another group and class, one to one where possible; [M].

    Sounds that no item of this set uses, and sounds without a rival, are -1.
    """
    between, _ = negative_masks(sounds, items)
    used = np.array(sorted({item.sound for item in items}), dtype=np.int64)
    partner = np.full(len(sounds), -1, np.int64)
    found = derangement(between[np.ix_(used, used)], seed)
    partner[used] = np.where(found >= 0, used[found], -1)
    return partner


def win_rates_per_pair(looks: JudgeFeatures, sounds: Sequence[EvalAudio], items: Sequence[EvalPair]) -> dict[str, DoubleArray]:
    """Win rate of every item in every row of the table: row name -> [N], NaN where it does not exist.

    model: samples of the item's own sound against samples of its rivals.
    shuffled_audio: samples of a rival in place of its own, which is among the rivals then; mean over all who may stand in.
    unconditional: samples without any sound, against the rivals that the model has.
    ground_truth: real pictures on both sides: how well this judge tells real pictures of different sounds apart.
    text_oracle: samples of texts on both sides, the item's own against those of the items whose sounds are rivals.
    """
    _, item_rivals = negative_masks(sounds, items)
    own = np.array([item.sound for item in items])
    scores = np.einsum("nk,msk->nms", looks.asked, looks.drawn)
    rows = np.arange(len(items))
    rates = {"model": item_win_rates(scores[rows, own], scores, item_rivals)}
    rates["shuffled_audio"] = _shuffled_rates(scores, item_rivals, own)
    rates["unconditional"] = item_win_rates(looks.asked @ looks.unconditional.T, scores, item_rivals)
    rates["ground_truth"] = _real_rates(looks)
    if looks.spoken is not None and looks.text is not None:
        rates["text_oracle"] = _text_rates(looks.asked, looks.spoken, looks.text, item_rivals[:, own])
    return rates


def _shuffled_rates(scores: DoubleArray, item_rivals: npt.NDArray[np.bool_], own: IntArray) -> DoubleArray:
    """[N], exact over all derangements, so that no draw of one moves it.

    Among themselves the stand-ins win a half, whatever the model does. Only the item's own sound can bring the row below
    that: with w the model's rate and R rivals it is 1/2 + (1/2 - w) / R. Without the own sound it would say nothing.
    """
    rates = np.full(len(own), np.nan)
    for item, others in enumerate(item_rivals):
        count = int(others.sum())
        if count:
            among = others.copy()
            among[own[item]] = True
            share = mann_whitney_win_rate(scores[item, others].ravel(), scores[item, among].ravel())
            rates[item] = ((count + 1) * share - 0.5) / count  # a stand-in is no rival of itself, where it wins a half
    return rates


def _text_rates(asked: DoubleArray, spoken: DoubleArray, text: IntArray, rival_items: npt.NDArray[np.bool_]) -> DoubleArray:
    """[N]; `rival_items` [N, N] says whose sounds are rivals. An item that shares the words is no rival."""
    scores = np.einsum("nk,tsk->nts", asked, spoken)
    rates = np.full(len(text), np.nan)
    for item, own in enumerate(text):
        others = np.setdiff1d(text[rival_items[item]], [own, -1])
        if own >= 0 and len(others):
            rates[item] = mann_whitney_win_rate(scores[item, own], scores[item, others].ravel())
    return rates


def _real_rates(looks: JudgeFeatures) -> DoubleArray:
    scores = looks.asked @ looks.real.T
    rates = np.full(len(scores), np.nan)
    for item, (own, rival) in enumerate(zip(looks.own_real, looks.rival_real, strict=True)):
        if len(own) and len(rival):
            rates[item] = item_win_rates(
                scores[item, own][None], scores[item, rival][None, :, None], np.ones((1, len(rival)), bool)
            )[0]
    return rates
