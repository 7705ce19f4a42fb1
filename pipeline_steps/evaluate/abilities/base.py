"""Interface of an ability: a sweep of one property of the audio, its controls, and a score of the images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline_steps.core.array_types import ByteArray, DoubleArray, FloatArray
from pipeline_steps.evaluate.abilities.scores import ClassSpace
from pipeline_steps.evaluate.evaluation_plan import EvalAudio, evenly_spaced_indices
from pipeline_steps.evaluate.generation import ImageGenerator

SWEEP = "sweep"
"""Condition in which the property changes; every other condition is a control."""


@dataclass(frozen=True, slots=True)
class AbilityItem:
    """Clips of one measurement, as indices into the clips of the evaluation.

    Attributes:
        first: the clip; its group is the cluster.
        second: clip of another class, or whose class is the word.
        other: another clip of the class of `first`.
    """

    first: int
    second: int | None = None
    other: int | None = None


@dataclass(frozen=True, slots=True)
class Sweep:
    """One condition of one item.

    Attributes:
        audio: clips for the report: one per point, or the two ends.
        generate: returns the images uint8 [P, S, side, side, 3].
    """

    audio: Sequence[FloatArray]
    generate: Callable[[], ByteArray]


@dataclass(frozen=True, slots=True)
class AbilitySetup:
    """What the abilities use.

    Attributes:
        clips: held-out clips of the evaluation.
        audio: samples of each clip.
        generator: of the evaluated model.
        classes: class space of the judge; None if fewer than two classes are known.
        num_clips: items per ability.
        num_samples: noise seeds per point.
        seed: of the noise.
    """

    clips: Sequence[EvalAudio]
    audio: Sequence[FloatArray]
    generator: ImageGenerator
    classes: ClassSpace | None
    num_clips: int
    num_samples: int
    seed: int

    def label(self, clip: int | None) -> str:
        """Class of a clip that was chosen because its class is known."""
        assert clip is not None
        label = self.clips[clip].label
        assert label is not None
        return label

    def from_audio(self, clips: Sequence[FloatArray]) -> Sweep:
        """Condition whose points are clips."""
        return Sweep(clips, lambda: self.generator.generate(clips, self.num_samples, self.seed))


class Ability(ABC):
    """One ability.

    Attributes:
        name: key of `evaluation.json`.
        title: heading in the report.
        claim: what the sweep shows if the model has the ability, as a clause.
        axis: label of the points with their unit.
        score_name: label of the score.
        points: positions of the sweep.
        direction: predicted trend of the score, 1: rising, -1: falling, 0: either.
        flat_controls: conditions in which the score must not follow the points.
        pixel_score: whether the score is of pixels and not of the judge.
        requires_text: whether the model needs a text encoder.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    claim: ClassVar[str]
    axis: ClassVar[str]
    score_name: ClassVar[str]
    points: ClassVar[tuple[float, ...]]
    direction: ClassVar[int]
    flat_controls: ClassVar[tuple[str, ...]]
    pixel_score: ClassVar[bool] = False
    requires_text: ClassVar[bool] = False

    @abstractmethod
    def items(self, setup: AbilitySetup) -> list[AbilityItem]:
        """Clips to measure, at most `setup.num_clips` items."""

    @abstractmethod
    def conditions(self, setup: AbilitySetup, item: AbilityItem) -> dict[str, Sweep]:
        """The sweep, under `SWEEP`, and its controls."""

    @abstractmethod
    def scores(self, setup: AbilitySetup, item: AbilityItem, images: ByteArray, features: DoubleArray) -> DoubleArray:
        """Scores [P, S] of images [P, S, H, W, 3] and of their unit rows [P, S, K] in the space of the judge."""

    def extras(self, setup: AbilitySetup, item: AbilityItem, images: ByteArray, features: DoubleArray) -> dict[str, float]:
        """Further numbers of a condition of an item."""
        return {}

    @abstractmethod
    def describe_item(self, setup: AbilitySetup, item: AbilityItem) -> str:
        """Caption of an item in the report."""


def choose_single(setup: AbilitySetup) -> list[AbilityItem]:
    """Evenly spaced clips of distinct groups."""
    first_of_group: dict[str, int] = {}
    for index, clip in enumerate(setup.clips):
        if np.any(setup.audio[index]):
            first_of_group.setdefault(clip.group, index)
    usable = sorted(first_of_group.values())
    return [AbilityItem(usable[place]) for place in evenly_spaced_indices(len(usable), setup.num_clips)]


def choose_pairs(setup: AbilitySetup, with_other: bool) -> list[AbilityItem]:
    """Clips with a clip of another class, and (`with_other`) with another recording of their own class.

    Classes with more calibration images come first, since their means are surer. A clip is used once; only a small set uses
    a second clip again.
    """
    assert setup.classes is not None
    counts = setup.classes.counts
    by_class: dict[str, dict[str, int]] = {}
    for index, clip in enumerate(setup.clips):
        if clip.label in counts and np.any(setup.audio[index]):
            by_class.setdefault(str(clip.label), {}).setdefault(clip.group, index)
    queues = {label: sorted(by_class[label].values()) for label in sorted(by_class, key=lambda label: (-counts[label], label))}
    size = 2 if with_other else 1
    taken: list[list[int]] = []
    for place in range(max(map(len, queues.values()), default=0)):
        taken += [queue[place * size : (place + 1) * size] for queue in queues.values()]
    taken = [own for own in taken if len(own) == size][: setup.num_clips]
    used = {index for own in taken for index in own}
    rest = [index for place in range(max(map(len, queues.values()), default=0)) for index in _at(queues, place)]
    items = []
    for own in taken:
        partners = [index for index in rest if _differ(setup.clips[index], setup.clips[own[0]])]
        second = next((index for index in partners if index not in used), partners[0] if partners else None)
        if second is not None:
            used.add(second)
            items.append(AbilityItem(own[0], second, own[1] if with_other else None))
    return items


def _at(queues: dict[str, list[int]], place: int) -> list[int]:
    return [queue[place] for queue in queues.values() if place < len(queue)]


def _differ(first: EvalAudio, second: EvalAudio) -> bool:
    return first.label != second.label and first.group != second.group
