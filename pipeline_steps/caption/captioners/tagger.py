"""The embedded captioner: picture tags, and a hand-reviewed lexicon that says what each tagged thing sounds like.

A tagger, not a language model: it knows the 1000 ImageNet labels (and, as an option, the 80 COCO objects) and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline_steps.caption.captioners.base import CaptionResult, EventSelection
from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.models.base import SoundEvent
from pipeline_steps.models.vision.efficientnet_lite import EfficientNetLite, EfficientNetLite0, EfficientNetLite3
from pipeline_steps.models.vision.image_transforms import Framing

IMAGENET = "imagenet"
COCO = "coco"
MODELS: dict[str, type[EfficientNetLite]] = {model.name: model for model in (EfficientNetLite0, EfficientNetLite3)}
"""Taggers of the vocabulary IMAGENET, by name."""
SILENT_SHARE = 0.5
"""Probability of silent labels from which an abstaining picture is called silent rather than unclear."""


@dataclass(frozen=True, slots=True)
class LexiconEntry:
    """One line of the lexicon: a sound that a labelled thing suggests.

    Attributes:
        sound: short acoustic phrase, e.g. "dog barking".
        source: what makes it.
        visible: whether the labelled thing itself makes it (else the scene around it does).
        salience: 0..1, prominence among the sounds of this thing.
        audibility: 0..1, how likely one hears it when the thing is there.
    """

    sound: str
    source: str
    visible: bool
    salience: float
    audibility: float


PRIOR_FLOOR = 1e-3

Lexicon = Mapping[tuple[str, int], Sequence[LexiconEntry]]
"""(vocabulary, label index) -> sounds; an empty sequence says that the thing is silent."""


@dataclass(frozen=True, slots=True)
class LabelScore:
    """A label seen in a picture with its probability."""

    vocabulary: str
    index: int
    label: str
    probability: float


def discount_label_prior(tags: Sequence[LabelScore], prior: Mapping[int, float], strength: float) -> list[LabelScore]:
    """Tags with ImageNet probabilities divided by (prior + 0.001) ** strength and scaled back to their sum.

    A network that sees a drawing unlike any photograph falls back on a few labels (piggy bank, whistle, nipple), whatever is
    drawn. How often it says each label over many pictures tells which; no label of a picture is needed for that.

    Args:
        tags: of one picture.
        prior: mean probability of each ImageNet index; a missing one counts as 0.
        strength: 0 changes nothing, 1 is Bayes' rule with an even prior instead.
    """
    if strength == 0.0:
        return list(tags)
    weighted = {
        tag.index: tag.probability / (prior.get(tag.index, 0.0) + PRIOR_FLOOR) ** strength
        for tag in tags
        if tag.vocabulary == IMAGENET
    }
    before = sum(tag.probability for tag in tags if tag.vocabulary == IMAGENET)
    scale = before / sum(weighted.values()) if weighted and sum(weighted.values()) > 0 else 0.0
    return [replace(tag, probability=weighted[tag.index] * scale) if tag.vocabulary == IMAGENET else tag for tag in tags]


def tags_to_events(tags: Sequence[LabelScore], lexicon: Lexicon) -> list[SoundEvent]:
    """Every sound that the tags of one picture suggest, by salience x confidence.

    Within a vocabulary whose labels exclude each other (ImageNet's softmax) the probabilities of the labels that share a
    phrase add up: 118 breeds are one `dog barking`. Between vocabularies, which see independently, confidences combine by
    noisy-or. With p the label's probability, a its audibility and s its salience for a phrase:
    confidence = 1 - prod over vocabularies (1 - sum p a), salience = sum(p s) / sum(p).
    """
    said: dict[str, list[tuple[LabelScore, LexiconEntry]]] = {}
    for tag in tags:
        for entry in lexicon.get((tag.vocabulary, tag.index), ()):
            said.setdefault(entry.sound, []).append((tag, entry))
    events = []
    for sound, evidence in said.items():
        unheard = 1.0
        for vocabulary in sorted({tag.vocabulary for tag, _ in evidence}):
            heard = sum(tag.probability * entry.audibility for tag, entry in evidence if tag.vocabulary == vocabulary)
            unheard *= 1.0 - min(1.0, heard)
        mass = sum(tag.probability for tag, _ in evidence)
        salience = sum(tag.probability * entry.salience for tag, entry in evidence) / mass if mass > 0 else 0.0
        entry = max(evidence, key=lambda pair: pair[0].probability)[1]  # the likeliest label says what makes the sound
        events.append(SoundEvent(sound, entry.source, entry.visible, min(1.0, salience), 1.0 - unheard))
    return sorted(events, key=lambda event: (-event.salience * event.confidence, event.sound))


def select_events(tags: Sequence[LabelScore], lexicon: Lexicon, rules: EventSelection) -> CaptionResult:
    """Tags of one picture -> its caption: up to `max_events` events, or a reason to abstain and guesses."""
    events = tags_to_events(tags, lexicon)
    score = max((event.confidence for event in events), default=0.0)
    floor = rules.min_share * max((event.salience * event.confidence for event in events), default=0.0)
    kept = tuple(event for event in events if event.salience * event.confidence >= floor)[: rules.max_events]
    if kept and score > 0 and score >= rules.min_confidence:
        return CaptionResult(kept, "", "", score)
    top = ", ".join(f"{tag.label} {tag.probability:.2f}" for tag in sorted(tags, key=lambda tag: -tag.probability)[:3])
    silent = sum(tag.probability for tag in tags if tag.vocabulary == IMAGENET and not lexicon.get((IMAGENET, tag.index)))
    if silent >= SILENT_SHARE:
        return CaptionResult((), "NO_SOUND", f"what is seen makes no sound: {top}", score, kept)
    reason = f"no sound is likely enough (best {score:.2f} of {rules.min_confidence:.2f}): {top}"
    return CaptionResult((), "LOW_CONFIDENCE", reason, score, kept)


class TaggerCaptioner:
    """`SoundCaptioner` from the tags of EfficientNet-Lite networks and a lexicon.

    Args:
        assets: folder written by the `assets` stage.
        lexicon: what each label sounds like.
        rules: how tags become events.
        detectors: further taggers; `ssd` adds SSD-MobileNet-v2's COCO objects (then no judge may be of its family).
        views: framings of the picture whose probabilities are averaged.
        models: names in `MODELS` whose probabilities are averaged, in any order.
        min_probability: tags below it are not kept.
        prior: how often the tagger says each ImageNet index over many pictures.
        prior_strength: how far its favourites are discounted, see `without_prior`.
    """

    name = "tagger"
    version = 1

    def __init__(
        self,
        assets: Path,
        lexicon: Lexicon,
        rules: EventSelection | None = None,
        detectors: Sequence[str] = (),
        views: Sequence[Framing] = ("crop",),
        min_probability: float = 1e-3,
        prior: Mapping[int, float] | None = None,
        prior_strength: float = 0.0,
        device: str = "cpu",
        models: Sequence[str] = ("efficientnet_lite0", "efficientnet_lite3"),
    ) -> None:
        self.lexicon = lexicon
        self.rules = rules or EventSelection()
        self.min_probability = min_probability
        self.prior = dict(prior or {})
        self.prior_strength = prior_strength
        self._taggers = [MODELS[model](assets, device, framing=view) for model in sorted(set(models)) for view in views]
        self._detector: Any = None
        if "ssd" in detectors:
            from pipeline_steps.models.vision.ssd_mobilenet_v2 import SsdMobileNetV2

            self._detector = SsdMobileNetV2(assets)

    @property
    def families(self) -> tuple[str, ...]:
        """Families of the models that look at the picture: none of them may judge pictures later."""
        return tuple(
            sorted({tagger.family for tagger in self._taggers} | ({self._detector.family} if self._detector else set()))
        )

    @property
    def family(self) -> str:
        """The families in one word."""
        return "+".join(self.families)

    def load(self) -> Self:
        """Read and check the weights; calling it again does nothing."""
        for tagger in self._taggers:
            tagger.load()
        if self._detector is not None:
            self._detector.load()
        return self

    def describe_tags(self) -> dict[str, Any]:
        """Everything but the picture that shapes the tags (not the lexicon: editing it costs no forward pass)."""
        models = [tagger.describe() for tagger in self._taggers] + ([self._detector.describe()] if self._detector else [])
        return {"name": self.name, "version": self.version, "models": models, "min_probability": self.min_probability}

    def describe(self) -> dict[str, Any]:
        """Name, family, version, models, lexicon and rules."""
        entries = {
            f"{vocabulary}/{index}": [[e.sound, e.source, e.visible, e.salience, e.audibility] for e in sounds]
            for (vocabulary, index), sounds in self.lexicon.items()
        }
        rules = [self.rules.max_events, self.rules.min_confidence, self.rules.min_share, self.prior_strength]
        prior = fingerprint({str(index): value for index, value in self.prior.items()})
        return {**self.describe_tags(), "family": self.family, "lexicon": fingerprint(entries), "prior": prior, "rules": rules}

    def tags(self, images: Sequence[ByteArray]) -> list[list[LabelScore]]:
        """Tags of each picture with a probability of at least `min_probability`, by vocabulary and index."""
        probabilities: FloatArray = np.mean(
            [tagger.probabilities(images) for tagger in self._taggers], axis=0, dtype=np.float32
        )
        labels = [label.split(", ")[0] for label in self._taggers[0].labels]
        result = []
        for row in probabilities:
            seen = np.flatnonzero(row >= self.min_probability)
            result.append([LabelScore(IMAGENET, int(index), labels[index], float(row[index])) for index in seen])
        if self._detector is not None:
            for tags, detections in zip(result, self._detector.detect(images), strict=True):
                scores: dict[int, tuple[float, str]] = {}
                for found in detections:  # several boxes of one kind: the surest one speaks for it
                    if found.score > scores.get(found.index, (self.min_probability, ""))[0]:
                        scores[found.index] = (float(found.score), found.label)
                tags.extend(LabelScore(COCO, index, label, score) for index, (score, label) in sorted(scores.items()))
        return result

    def caption(self, images: Sequence[ByteArray]) -> list[list[SoundEvent]]:
        """Events of each picture, most prominent first; an empty list when it suggests no sound."""
        return [list(self.compose(tags).events) for tags in self.tags(images)]

    def compose(self, tags: Sequence[LabelScore]) -> CaptionResult:
        """Tags of one picture -> its caption, with this captioner's prior, lexicon and rules."""
        return select_events(discount_label_prior(tags, self.prior, self.prior_strength), self.lexicon, self.rules)
