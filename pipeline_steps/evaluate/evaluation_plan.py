"""Evaluation plan: the evaluated pairs, and the audio clips from which images are generated. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline_steps.audio.mixing import Tracks, pair_tracks
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.evaluate.ground_truth import GroundTruth

Row = Mapping[str, Any]

SET_TITLES = {
    "test": "Test pairs (held-out images and audio of the pool)",
    "gold": "Gold pairs (true image-audio pairs that no other stage uses)",
    "gold_seen_classes": "Gold pairs whose class occurs in training",
}
"""Evaluated sets with their titles in the report."""
TRAINING_TITLE = "Training pairs (not evaluated: the model has seen them)"
MIN_PAIRS = 2
"""Pairs of a set below which no other pair can serve as the negative."""
SHOWN_TRAINING_PAIRS = 8


@dataclass(frozen=True, slots=True)
class EvalAudio:
    """One audio clip from which images are generated.

    Attributes:
        key: `mix_id` of the tracks.
        group: near-duplicate group.
        label: ground-truth class; None if unknown.
        tracks: audio ids and gains that are mixed.
    """

    key: str
    group: str
    label: str | None
    tracks: Tracks = ()


@dataclass(frozen=True, slots=True)
class EvalPair:
    """One evaluated pair.

    Attributes:
        name: pair id, or the name of a gold pair.
        image_id: catalog id.
        image_group: near-duplicate group of the image.
        clip: index into `EvaluationPlan.clips`.
    """

    name: str
    image_id: str
    image_group: str
    clip: int


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Pairs to evaluate and what the judges may use beside them.

    Attributes:
        clips: distinct audio clips of all sets, in order of first use.
        sets: pairs by name of the set, see `SET_TITLES`; `gold_seen_classes` is a subset of `gold`.
        num_skipped: test pairs left out by `max_test_pairs`.
        seen_classes: labels of the images and of the audio of training pairs.
        labels: ground-truth class by catalog id.
        image_groups: near-duplicate group by image id.
        training_pairs: rows of the pair table with split `train`.
        shown_training_pairs: training pairs whose samples are shown because there is no test pair and no gold pair.
    """

    clips: tuple[EvalAudio, ...]
    sets: Mapping[str, tuple[EvalPair, ...]]
    num_skipped: int = 0
    seen_classes: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    image_groups: Mapping[str, str] = field(default_factory=dict)
    training_pairs: tuple[Row, ...] = ()
    shown_training_pairs: tuple[EvalPair, ...] = ()

    def too_few_to_judge(self, num_calibration_images: int, min_calibration_images: int) -> str:
        """Why nothing can be measured with this many calibration images; empty if a set can be evaluated."""
        test, gold = len(self.sets["test"]), len(self.sets["gold"])
        if max(test, gold) < MIN_PAIRS:
            return f"too few to judge: {test} test pairs and {gold} gold pairs, one of the two sets needs {MIN_PAIRS} or more"
        if num_calibration_images < min_calibration_images:
            return (
                f"too few to judge: {num_calibration_images} of at least {min_calibration_images} images outside the evaluated "
                "groups to calibrate a judge"
            )
        return ""

    def clips_of(self, name: str) -> list[int]:
        """Indices of the clips of a set, each once, sorted."""
        return sorted({pair.clip for pair in self.sets[name]})


def build_evaluation_plan(
    pairs: Sequence[Row],
    truth: GroundTruth,
    image_groups: Mapping[str, str],
    audio_groups: Mapping[str, str],
    max_test_pairs: int,
) -> EvaluationPlan:
    """Select the pairs of every set.

    Args:
        pairs: rows of the pair table, all splits.
        truth: labels by catalog id, and gold pairs.
        image_groups, audio_groups: near-duplicate group by catalog id.
        max_test_pairs: more test pairs are subsampled evenly in the order of pair ids.
    """
    clips: list[EvalAudio] = []
    indices: dict[str, int] = {}

    def clip_index(tracks: Tracks, group: str, label: str | None) -> int:
        key = mix_id(tracks)
        if key not in indices:
            indices[key] = len(clips)
            clips.append(EvalAudio(key, group, label, tracks))
        return indices[key]

    all_test = sorted((pair for pair in pairs if pair["split"] == "test"), key=lambda pair: str(pair["pair_id"]))
    selected = [all_test[index] for index in evenly_spaced_indices(len(all_test), max_test_pairs)]

    def evaluated(pair: Row) -> EvalPair:
        label = truth.labels.get(pair["tracks"][0]["audio_id"])
        index = clip_index(pair_tracks(pair), pair["audio_group"], label)
        return EvalPair(pair["pair_id"], pair["image_id"], pair["image_group"], index)

    test = [evaluated(pair) for pair in selected]
    gold = [
        EvalPair(
            pair.name,
            pair.image_id,
            image_groups[pair.image_id],
            clip_index(((pair.audio_id, 0.0),), audio_groups[pair.audio_id], pair.label),
        )
        for pair in truth.pairs
    ]
    training_pairs = tuple(pair for pair in pairs if pair["split"] == "train")
    shown = []
    if not test and not gold:
        indices_shown = evenly_spaced_indices(len(training_pairs), SHOWN_TRAINING_PAIRS)
        shown = [evaluated(training_pairs[index]) for index in indices_shown]
    seen = seen_classes(training_pairs, truth.labels)
    gold_seen = [item for item, pair in zip(gold, truth.pairs, strict=True) if pair.label in seen]
    return EvaluationPlan(
        tuple(clips),
        {"test": tuple(test), "gold": tuple(gold), "gold_seen_classes": tuple(gold_seen)},
        len(all_test) - len(selected),
        frozenset(seen),
        truth.labels,
        image_groups,
        training_pairs,
        tuple(shown),
    )


def select_calibration_images(plan: EvaluationPlan, images: Sequence[Row], pairs: Sequence[Row], max_images: int) -> list[str]:
    """Ids of at most `max_images` real images that calibrate a judge.

    They belong to the pool and to no near-duplicate group of an evaluated pair or a test pair. Images of training pairs come
    first, then labeled images, then the others, each in the order of ids.
    """
    evaluated = {pair.image_group for selected in plan.sets.values() for pair in selected}
    evaluated |= {row["image_group"] for row in pairs if row["split"] == "test"}
    paired = {row["image_id"] for row in plan.training_pairs}
    free = [row["image_id"] for row in images if not row["holdout"] and row["group_id"] not in evaluated]
    ordered = sorted(free, key=lambda image_id: (image_id not in paired, image_id not in plan.labels, image_id))
    return sorted(ordered[:max_images])


def pair_texts(plan: EvaluationPlan, pairs: Iterable[Row], events: Iterable[Row]) -> dict[str, str]:
    """Text of each evaluated pair for the text oracle, by name of the pair; ground-truth labels are not used.

    A pair of the pool has the phrases by which its audio was chosen. A gold pair has the most prominent event of its image. A
    pair whose image has no event has no text.
    """
    phrases = {str(pair["pair_id"]): " and ".join(str(track["phrase"]) for track in pair["tracks"]) for pair in pairs}
    first_event = {str(event["image_id"]): str(event["phrase"]) for event in events if event["rank"] == 0}
    texts = {
        pair.name: phrases.get(pair.name) or first_event.get(pair.image_id)
        for selected in plan.sets.values()
        for pair in selected
    }
    return {name: text for name, text in texts.items() if text}


def seen_classes(training_pairs: Iterable[Row], labels: Mapping[str, str]) -> set[str]:
    """Labels of the images and of the audio of training pairs."""
    ids = {item for pair in training_pairs for item in (pair["image_id"], *(track["audio_id"] for track in pair["tracks"]))}
    return {labels[item] for item in ids if item in labels}


def mix_id(tracks: Tracks) -> str:
    """Key of a mixture: the audio id itself for one track at 0 dB, else a fingerprint of ids and gains."""
    if len(tracks) == 1 and tracks[0][1] == 0.0:
        return tracks[0][0]
    return fingerprint([[audio_id, round(gain, 4)] for audio_id, gain in tracks])


def tracks_by_mix(plan: EvaluationPlan, pairs: Iterable[Row]) -> dict[str, Tracks]:
    """Tracks of the clips of a plan and of further pairs, by their key."""
    tracks = {clip.key: clip.tracks for clip in plan.clips}
    return tracks | {mix_id(clip): clip for clip in map(pair_tracks, pairs)}


def evenly_spaced_indices(n: int, at_most: int, include_last: bool = False) -> list[int]:
    """At most `at_most` evenly spaced indices below `n`, sorted; the first is 0, the last is n - 1 if `include_last`."""
    if n <= at_most:
        return list(range(n))
    if include_last and at_most > 1:
        return [round(index * (n - 1) / (at_most - 1)) for index in range(at_most)]
    return [index * n // at_most for index in range(at_most)]
