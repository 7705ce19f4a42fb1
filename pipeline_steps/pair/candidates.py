"""What each picture could sound like: its events' neighbors, calibrated, weighed and joined into one list per picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import DoubleArray, IntArray
from pipeline_steps.core.seeding import seeded_rng

FLOOR = 1e-3
"""Smallest value of a candidate: above 0, which is what abstaining is worth."""

KEY_SPAN = 2**62
"""Largest sort key that is packed into one integer."""

CHUNK = 20_000
"""Events expanded at a time: bounds the memory at events x neighbors of one chunk."""


@dataclass(frozen=True, slots=True)
class NeighborArrays:
    """Rows of the neighbor table as arrays, ordered by text then rank: rows of text t are `starts[t]:starts[t + 1]`."""

    starts: IntArray
    sound: IntArray
    score: DoubleArray
    z: DoubleArray
    damped: DoubleArray


@dataclass(frozen=True, slots=True)
class EventArrays:
    """Rows of the event table as arrays, ordered by picture then rank; `weight` in (0, 1]."""

    picture: IntArray
    text: IntArray
    weight: DoubleArray


@dataclass(frozen=True, slots=True)
class Candidates:
    """Edges picture -> sound, ordered by picture and falling value; `event` and `row` say which event and neighbor won."""

    picture: IntArray
    sound: IntArray
    value: DoubleArray
    event: IntArray
    row: IntArray

    def __len__(self) -> int:
        return len(self.value)

    def where(self, keep: npt.NDArray[np.bool_]) -> Candidates:
        """The edges selected by a boolean mask."""
        return Candidates(self.picture[keep], self.sound[keep], self.value[keep], self.event[keep], self.row[keep])


def null_threshold(
    text: npt.NDArray[np.float32], audio: npt.NDArray[np.float32], quantile: float, samples: int, seed: int
) -> float:
    """The z that random sounds reach with probability 1 - `quantile`, over texts taken together.

    z of a text and a sound is (score - mean) / std, both over random pool sounds for that text: a text that nothing in the
    pool answers has a flat row and small z, so it fails a threshold that is common to all texts. (A threshold of each text
    for itself would always be passed by the best sounds of a large pool.)

    Args:
        text: unit rows [T, D]; audio: unit rows [A, D]; samples: scores to draw, all of them if there are fewer.
    """
    if len(text) == 0 or len(audio) < 2:
        return -np.inf
    random = seeded_rng(seed, "null")
    sounds = min(len(audio), max(2, min(2000, samples)))
    texts = min(len(text), max(1, samples // sounds))
    rows = np.sort(random.choice(len(text), texts, replace=False))
    columns = np.sort(random.choice(len(audio), sounds, replace=False))
    score = text[rows].astype(np.float64) @ audio[columns].astype(np.float64).T
    spread = score.std(axis=1, keepdims=True)
    z = np.divide(score - score.mean(axis=1, keepdims=True), spread, out=np.zeros_like(score), where=spread > 1e-12)
    return float(np.quantile(z, quantile))


def event_weight(salience: DoubleArray, confidence: DoubleArray, emphasis: float) -> DoubleArray:
    """(salience x confidence)^emphasis, in (0, 1].

    Not relative to the picture's best event: where a sound is scarce, the picture that is surer of its event gets it.
    """
    return np.asarray(np.clip(salience * confidence, 1e-6, 1.0) ** emphasis)


def normalize_scores(neighbors: NeighborArrays, admissible: npt.NDArray[np.bool_]) -> DoubleArray:
    """Damped scores in units of their standard deviation above the lowest admissible one; at least `FLOOR`."""
    result = np.full(len(neighbors.damped), FLOOR)
    damped = neighbors.damped[admissible]
    if len(damped):
        result[admissible] = np.maximum((damped - damped.min()) / max(float(damped.std()), 1e-9), FLOOR)
    return result


def build_candidates(
    events: EventArrays,
    neighbors: NeighborArrays,
    value: DoubleArray,
    admissible: npt.NDArray[np.bool_],
    combine: str,
    keep: int,
) -> Candidates:
    """Value of every (picture, sound): over the picture's events, the largest weight x value ("max") or
    sum(weight x value) / sum(weight) ("mean", where an event that does not list the sound counts 0); best `keep` a picture.

    Inadmissible neighbor rows are no candidates. The winning event is the one that contributes most, the earlier in a tie.
    """
    parts: list[Candidates] = []
    at = 0
    while at < len(events.picture):
        end = min(at + CHUNK, len(events.picture))
        while end < len(events.picture) and events.picture[end] == events.picture[end - 1]:
            end += 1
        parts.append(_join_chunk(events, at, end, neighbors, value, admissible, combine, keep))
        at = end
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return Candidates(empty, empty, np.zeros(0), empty, empty)
    return Candidates(*(np.concatenate([getattr(part, name) for part in parts]) for name in Candidates.__dataclass_fields__))


def _join_chunk(
    events: EventArrays,
    at: int,
    end: int,
    neighbors: NeighborArrays,
    value: DoubleArray,
    admissible: npt.NDArray[np.bool_],
    combine: str,
    keep: int,
) -> Candidates:
    text = events.text[at:end]
    lengths = neighbors.starts[text + 1] - neighbors.starts[text]
    event = np.repeat(np.arange(at, end), lengths)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    row = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - neighbors.starts[text], lengths)
    event, row = event[admissible[row]], row[admissible[row]]
    picture, sound = events.picture[event], neighbors.sound[row]
    contribution = events.weight[event] * value[row]
    if combine == "max":
        begins, best = _largest(event, picture, sound, contribution)
    else:
        order = np.lexsort((event, -contribution, sound, picture))
        begins, best = _mean(order, events, at, end, picture, sound, contribution)
    found = Candidates(picture[begins], sound[begins], np.maximum(best, FLOOR * 1e-3), event[begins], row[begins])
    # Rows come by picture and rising sound, and the sort is stable: equal values stay in the order of their sounds.
    order = np.lexsort((-found.value, found.picture))
    found = Candidates(*(getattr(found, name)[order] for name in Candidates.__dataclass_fields__))
    return found.where(rank_within(found.picture) < keep)


def _largest(event: IntArray, picture: IntArray, sound: IntArray, contribution: DoubleArray) -> tuple[IntArray, DoubleArray]:
    """For each (picture, sound), in that order: the row with the largest contribution (the earliest event in a tie), and it."""
    if not len(event):
        return event, contribution
    # One sort of one integer is several times faster than a sort by four keys; the key holds all that orders the rows.
    wide = [value - value.min() for value in (picture, sound, event)]
    spans = [int(value.max()) + 1 for value in wide]
    if float(spans[0]) * spans[1] * spans[2] < KEY_SPAN:
        order = np.argsort((wide[0] * spans[1] + wide[1]) * spans[2] + wide[2])
    else:
        order = np.lexsort((event, sound, picture))
    picture, sound = picture[order], sound[order]
    begins = np.flatnonzero(np.r_[True, (picture[1:] != picture[:-1]) | (sound[1:] != sound[:-1])])
    ordered = contribution[order]
    best = np.maximum.reduceat(ordered, begins)
    hit = np.flatnonzero(ordered == np.repeat(best, np.diff(np.r_[begins, len(ordered)])))
    winner = hit[np.searchsorted(hit, begins)]
    return order[winner], best


def _mean(
    order: IntArray, events: EventArrays, at: int, end: int, picture: IntArray, sound: IntArray, contribution: DoubleArray
) -> tuple[IntArray, DoubleArray]:
    """The same with sum(weight x value) / sum(weight) as value, over all events of the picture."""
    if not len(order):
        return order, contribution
    picture, sound = picture[order], sound[order]
    begins = np.flatnonzero(np.r_[True, (picture[1:] != picture[:-1]) | (sound[1:] != sound[:-1])])
    total = np.zeros(int(events.picture[end - 1]) + 1)
    np.add.at(total, events.picture[at:end], events.weight[at:end])
    return order[begins], np.add.reduceat(contribution[order], begins) / total[picture[begins]]


def rank_within(key: IntArray) -> IntArray:
    """Position of each row in its run of equal keys: [7, 7, 9] -> [0, 1, 0]."""
    if not len(key):
        return np.zeros(0, dtype=np.int64)
    begins = np.flatnonzero(np.r_[True, key[1:] != key[:-1]])
    return np.arange(len(key)) - np.repeat(begins, np.diff(np.r_[begins, len(key)]))
