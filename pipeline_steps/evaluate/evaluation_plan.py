"""Which pairs are evaluated, which sounds are drawn for them, and which of them count as what. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.evaluate.ground_truth import GroundTruth

Track = tuple[str, float]
"""audio id and gain in dB."""


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """What is drawn and judged.

    Attributes:
        sounds: every sound that is drawn, each once, in order of first use.
        tracks: what each sound is made of.
        sets: name -> items; "test", "gold", and "gold_seen" (a subset of gold).
        titles: name -> a line for people.
        seen_classes: labels that occur in training, on the picture's or the sound's side.
        thinned: test pairs left out by `max_test_pairs`.
    """

    sounds: tuple[EvalAudio, ...]
    tracks: tuple[tuple[Track, ...], ...]
    sets: Mapping[str, tuple[EvalPair, ...]]
    titles: Mapping[str, str]
    seen_classes: frozenset[str]
    thinned: int


def build_evaluation_plan(
    pairs: Sequence[Mapping[str, Any]],
    truth: GroundTruth,
    image_groups: Mapping[str, str],
    audio_groups: Mapping[str, str],
    max_test_pairs: int,
) -> EvaluationPlan:
    """Decide what is evaluated.

    Args:
        pairs: rows of the pair table (all splits).
        truth: labels by item id, and gold pairs.
        image_groups, audio_groups: near-duplicate group by catalog id.
        max_test_pairs: more test pairs than this are thinned evenly in pair-id order.
    """
    sounds: list[EvalAudio] = []
    tracks: list[tuple[Track, ...]] = []
    index: dict[str, int] = {}

    def sound_of(parts: tuple[Track, ...], group: str, label: str | None) -> int:
        key = mix_id(parts)
        if key not in index:
            index[key] = len(sounds)
            sounds.append(EvalAudio(key, group, label))
            tracks.append(parts)
        return index[key]

    every_test = sorted((pair for pair in pairs if pair["split"] == "test"), key=lambda pair: str(pair["pair_id"]))
    test_rows = [every_test[place] for place in evenly_spaced_indices(len(every_test), max_test_pairs)]
    test = [
        EvalPair(
            pair["pair_id"],
            pair["image_id"],
            pair["image_group"],
            sound_of(pair_tracks(pair), pair["audio_group"], truth.labels.get(pair["tracks"][0]["audio_id"])),
        )
        for pair in test_rows
    ]
    gold = [
        EvalPair(
            pair.name,
            pair.image_id,
            image_groups[pair.image_id],
            sound_of(((pair.audio_id, 0.0),), audio_groups[pair.audio_id], pair.label),
        )
        for pair in truth.pairs
    ]
    seen = seen_classes(pairs, truth.labels)
    gold_seen = [item for item, pair in zip(gold, truth.pairs, strict=True) if pair.label in seen]
    sets = {"test": tuple(test), "gold": tuple(gold), "gold_seen": tuple(gold_seen)}
    titles = {
        "test": "Test pairs (held-out pictures and sounds of the pool)",
        "gold": "Gold pairs (true picture-sound pairs, never used before)",
        "gold_seen": "Gold pairs whose class occurs in training",
    }
    return EvaluationPlan(tuple(sounds), tuple(tracks), sets, titles, frozenset(seen), len(every_test) - len(test_rows))


def item_texts(
    agenda: EvaluationPlan, pairs: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]
) -> dict[str, str]:
    """Words for each item, for the text oracle: item name -> what the captioner heard in its picture; never a label.

    A pair of the pool has the phrases by which pairing chose its sounds; a gold pair, which was never paired, its picture's
    most prominent event. A picture that suggests no sound has no words.
    """
    phrases = {str(pair["pair_id"]): " and ".join(str(track["phrase"]) for track in pair["tracks"]) for pair in pairs}
    first = {str(event["image_id"]): str(event["phrase"]) for event in events if event["rank"] == 0}
    items = {item.name: item for key in agenda.sets for item in agenda.sets[key]}
    words = {name: phrases.get(name) or first.get(item.image_id) for name, item in items.items()}
    return {name: text for name, text in words.items() if text}


def seen_classes(pairs: Iterable[Mapping[str, Any]], labels: Mapping[str, str]) -> set[str]:
    """Classes that training saw or heard: labels of the pictures and of the sounds of all pairs of the train split."""
    found: set[str] = set()
    for pair in pairs:
        if pair["split"] == "train":
            ids = [pair["image_id"], *(track["audio_id"] for track in pair["tracks"])]
            found.update(labels[item] for item in ids if item in labels)
    return found


def pair_tracks(pair: Mapping[str, Any]) -> tuple[Track, ...]:
    """The tracks of a pair row as (audio id, gain in dB)."""
    return tuple((str(track["audio_id"]), float(track["gain_db"])) for track in pair["tracks"])


def mix_id(parts: Sequence[Track]) -> str:
    """A name for a rendered sound: the audio id itself if nothing was mixed or scaled, else a hash of the recipe."""
    if len(parts) == 1 and parts[0][1] == 0.0:
        return parts[0][0]
    return fingerprint([[audio_id, round(gain, 4)] for audio_id, gain in parts])


def evenly_spaced_indices(n: int, at_most: int) -> list[int]:
    """Up to `at_most` places out of `n`, evenly spread, first included, in order."""
    if n <= at_most:
        return list(range(n))
    return sorted({int(place) for place in np.floor(np.arange(at_most) * n / at_most)})


@dataclass(frozen=True, slots=True)
class EvalAudio:
    """One sound that is drawn: its key, its group (recordings of one origin) and its class, if known."""

    key: str
    group: str
    label: str | None


@dataclass(frozen=True, slots=True)
class EvalPair:
    """One evaluated pair: a picture and the sound it belongs to.

    Attributes:
        name: pair id, or the gold pair's name.
        image_id: catalog id.
        image_group: near-duplicate group of the picture.
        sound: index into the list of sounds.
    """

    name: str
    image_id: str
    image_group: str
    sound: int
