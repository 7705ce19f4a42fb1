"""Candidate clips of each image: the calibrated neighbors of its events, weighted and merged into one list per image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline_steps.core.array_types import BoolArray, DoubleArray, FloatArray, IntArray
from pipeline_steps.core.seeding import seeded_rng

FLOOR = 1e-3
"""Smallest value of a candidate; above 0, the value of abstaining."""

KEY_SPAN = 2**62
"""Bound of a sort key that is packed into one integer."""

CHUNK = 20_000
"""Events expanded at a time; memory is that of the neighbors of one chunk."""


@dataclass(frozen=True, slots=True)
class NeighborArrays:
    """Columns of the neighbor table, ordered by text then rank; the rows of text t are `starts[t]:starts[t + 1]`."""

    starts: IntArray
    audio: IntArray
    score: DoubleArray
    z_score: DoubleArray
    corrected_score: DoubleArray


@dataclass(frozen=True, slots=True)
class EventArrays:
    """Columns of the event table, ordered by image then rank; `weight` is in (0, 1]."""

    image: IntArray
    text: IntArray
    weight: DoubleArray


@dataclass(frozen=True, slots=True)
class Candidates:
    """Edges image -> clip, ordered by image and descending value, with the event and the neighbor row that gave the value."""

    image: IntArray
    audio: IntArray
    value: DoubleArray
    event: IntArray
    row: IntArray

    def __len__(self) -> int:
        return len(self.value)

    def where(self, keep: BoolArray | IntArray) -> Candidates:
        """Edges selected by a boolean mask, or in the order of indices."""
        return Candidates(self.image[keep], self.audio[keep], self.value[keep], self.event[keep], self.row[keep])


def null_threshold(text: FloatArray, audio: FloatArray, quantile: float, samples: int, seed: int) -> float:
    """z-score that random clips reach with probability 1 - `quantile`, over all texts together.

    The z-score of a text and a clip is (score - mean) / std over random pool clips for that text. A text without a match in the
    pool has a flat row and small z-scores, so it fails a threshold that is common to all texts. The best clips of a large pool
    would always reach a threshold per text.

    Args:
        text: unit rows [T, D]; audio: unit rows [A, D]; samples: scores to sample, at most all of them.
    """
    if len(text) == 0 or len(audio) < 2:
        return -np.inf
    random = seeded_rng(seed, "null")
    n_clips = min(len(audio), max(2, min(2000, samples)))
    n_texts = min(len(text), max(1, samples // n_clips))
    rows = np.sort(random.choice(len(text), n_texts, replace=False))
    columns = np.sort(random.choice(len(audio), n_clips, replace=False))
    score = text[rows].astype(np.float64) @ audio[columns].astype(np.float64).T
    spread = score.std(axis=1, keepdims=True)
    z = np.divide(score - score.mean(axis=1, keepdims=True), spread, out=np.zeros_like(score), where=spread > 1e-12)
    return float(np.quantile(z, quantile))


def event_weight(salience: DoubleArray, confidence: DoubleArray, exponent: float) -> DoubleArray:
    """Weights (salience x confidence)^exponent of events, in (0, 1].

    Weights are not relative to the image's best event, so that a scarce clip goes to the image with the more certain event.
    """
    return np.asarray(np.clip(salience * confidence, 1e-6, 1.0) ** exponent)


def normalize_scores(neighbors: NeighborArrays, admissible: BoolArray) -> DoubleArray:
    """Corrected scores above the lowest admissible one, in units of their standard deviation; at least `FLOOR`."""
    result = np.full(len(neighbors.corrected_score), FLOOR)
    score = neighbors.corrected_score[admissible]
    if len(score):
        result[admissible] = np.maximum((score - score.min()) / max(float(score.std()), 1e-9), FLOOR)
    return result


def build_candidates(
    events: EventArrays, neighbors: NeighborArrays, value: DoubleArray, admissible: BoolArray, pooling: str, keep: int
) -> Candidates:
    """The `keep` best clips of each image, with their value over the image's events.

    A neighbor row that is not admissible is no candidate. The event of an edge is the one that contributes most, in a tie the
    earlier one.

    Args:
        value: of each neighbor row.
        pooling: `max`: the largest weight x value; `mean`: sum(weight x value) / sum(weight), where an event that does not list
            the clip counts 0.
    """
    parts: list[Candidates] = []
    at = 0
    while at < len(events.image):
        end = min(at + CHUNK, len(events.image))
        while end < len(events.image) and events.image[end] == events.image[end - 1]:
            end += 1
        found = _merge_chunk(events, at, end, neighbors, value, admissible, pooling)
        # Rows are ordered by image and clip, and the sort is stable: equal values stay in the order of their clips.
        found = found.where(np.lexsort((-found.value, found.image)))
        parts.append(found.where(rank_within(found.image) < keep))
        at = end
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Candidates(empty, empty, np.zeros(0), empty, empty)
    return Candidates(*(np.concatenate([getattr(part, name) for part in parts]) for name in Candidates.__dataclass_fields__))


def _merge_chunk(
    events: EventArrays, at: int, end: int, neighbors: NeighborArrays, value: DoubleArray, admissible: BoolArray, pooling: str
) -> Candidates:
    """Candidates of the events `at:end`, ordered by image and clip."""
    text = events.text[at:end]
    lengths = neighbors.starts[text + 1] - neighbors.starts[text]
    event = np.repeat(np.arange(at, end), lengths)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    row = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - neighbors.starts[text], lengths)
    event, row = event[admissible[row]], row[admissible[row]]
    image, audio = events.image[event], neighbors.audio[row]
    contribution = events.weight[event] * value[row]
    if not len(event):
        return Candidates(image, audio, contribution, event, row)
    if pooling == "max":
        chosen, best = _maximum(event, image, audio, contribution)
    else:
        total = np.zeros(int(events.image[end - 1]) + 1)
        np.add.at(total, events.image[at:end], events.weight[at:end])
        order = np.lexsort((event, -contribution, audio, image))
        begins = _run_starts(image[order], audio[order])
        chosen = order[begins]
        best = np.add.reduceat(contribution[order], begins) / total[image[chosen]]
    return Candidates(image[chosen], audio[chosen], np.maximum(best, FLOOR * 1e-3), event[chosen], row[chosen])


def _maximum(event: IntArray, image: IntArray, audio: IntArray, contribution: DoubleArray) -> tuple[IntArray, DoubleArray]:
    """Row with the largest contribution (of the earliest event in a tie) of each (image, clip), and that contribution."""
    # Sorting one integer is several times faster than sorting by several keys; the integer holds all keys.
    keys = [value - value.min() for value in (image, audio, event)]
    spans = [int(value.max()) + 1 for value in keys]
    if float(spans[0]) * spans[1] * spans[2] < KEY_SPAN:
        order = np.argsort((keys[0] * spans[1] + keys[1]) * spans[2] + keys[2])
    else:
        order = np.lexsort((event, audio, image))
    begins = _run_starts(image[order], audio[order])
    ordered = contribution[order]
    best = np.maximum.reduceat(ordered, begins)
    hit = np.flatnonzero(ordered == np.repeat(best, np.diff(np.r_[begins, len(ordered)])))
    return order[hit[np.searchsorted(hit, begins)]], best


def _run_starts(*keys: IntArray) -> IntArray:
    """First index of each run of equal keys."""
    return np.flatnonzero(np.r_[True, np.any([key[1:] != key[:-1] for key in keys], axis=0)])


def rank_within(key: IntArray) -> IntArray:
    """Position of each row in its run of equal keys: [7, 7, 9] -> [0, 1, 0]."""
    if not len(key):
        return np.zeros(0, dtype=np.int64)
    begins = _run_starts(key)
    return np.arange(len(key)) - np.repeat(begins, np.diff(np.r_[begins, len(key)]))
