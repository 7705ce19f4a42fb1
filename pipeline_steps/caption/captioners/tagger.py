"""Captioner `tagger`: image labels of ImageNet classifiers, mapped to sound events by a hand-reviewed lexicon.

It is no language model: its vocabulary is the 1000 ImageNet labels and, as an option, the 80 COCO objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline_steps.caption.captioners.base import (
    CAPTIONERS,
    Captioner,
    CaptionOptions,
    CaptionResult,
    EventSelection,
    SoundEvent,
)
from pipeline_steps.caption.lexicon import COCO, IMAGENET, Lexicon, LexiconEntry, load_label_prior, load_lexicon
from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.hashing import fingerprint

PRIOR_FLOOR = 1e-3
SILENT_FRACTION = 0.5
"""Probability of silent labels from which an abstention has the code NO_SOUND instead of LOW_CONFIDENCE."""


class TaggerConfig(StageConfig):
    """Group `caption.tagger`."""

    detectors: list[Literal["ssd"]] = Field(
        default_factory=list, max_length=1, description="object detectors to add; `ssd` excludes judges of family ssd-mobilenet"
    )
    models: list[Literal["efficientnet_lite0", "efficientnet_lite3"]] = Field(
        ["efficientnet_lite0", "efficientnet_lite3"],
        min_length=1,
        max_length=2,
        description="classifiers whose probabilities are averaged, in any order",
    )
    crops: list[Literal["crop", "pad", "stretch"]] = Field(
        ["crop"], min_length=1, max_length=3, description="square versions of an image whose probabilities are averaged"
    )
    min_probability: float = Field(1e-3, gt=0, lt=1, description="labels below this probability are not cached")
    prior_strength: float = Field(1.0, ge=0, le=1, description="exponent of the correction by the label prior; 0 disables it")
    label_events: int = Field(
        0, ge=0, le=10, description="likeliest labels added to a caption as events with their bare names, beyond max_events"
    )


@dataclass(frozen=True, slots=True)
class LabelScore:
    """Label of an image with its probability."""

    vocabulary: str
    index: int
    label: str
    probability: float


def discount_label_prior(tags: Sequence[LabelScore], prior: Mapping[int, float], strength: float) -> list[LabelScore]:
    """Divide ImageNet probabilities by (prior + 0.001) ** strength and rescale them to their former sum.

    On drawings, the classifiers favor a few labels (piggy bank, whistle, nipple) whatever the content. The mean probability of
    each label over many images identifies these labels without ground truth.

    Args:
        tags: labels of one image.
        prior: mean probability of each ImageNet index; 0 if missing.
        strength: 0 changes nothing; 1 replaces the prior by a uniform one (Bayes' rule).
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
    """Map the labels of an image to all sound events of the lexicon, highest weight first.

    ImageNet labels exclude each other (softmax), so the probabilities of labels with the same phrase are added: 118 breeds
    become one `dog barking`. Vocabularies are independent, so their confidences are combined by noisy-or. For a phrase with
    label probabilities p, audibilities a and saliences s: confidence = 1 - prod over vocabularies (1 - sum p a) and
    salience = sum(p s) / sum(p).
    """
    by_phrase: dict[str, list[tuple[LabelScore, LexiconEntry]]] = {}
    for tag in tags:
        for entry in lexicon.get((tag.vocabulary, tag.index), ()):
            by_phrase.setdefault(entry.phrase, []).append((tag, entry))
    events = []
    for phrase, evidence in by_phrase.items():
        inaudible = 1.0
        for vocabulary in sorted({tag.vocabulary for tag, _ in evidence}):
            audible = sum(tag.probability * entry.audibility for tag, entry in evidence if tag.vocabulary == vocabulary)
            inaudible *= 1.0 - min(1.0, audible)
        mass = sum(tag.probability for tag, _ in evidence)
        salience = sum(tag.probability * entry.salience for tag, entry in evidence) / mass if mass > 0 else 0.0
        entry = max(evidence, key=lambda pair: pair[0].probability)[1]  # the most probable label determines the source
        events.append(SoundEvent(phrase, entry.sound_source, entry.visible, min(1.0, salience), 1.0 - inaudible))
    return sorted(events, key=lambda event: (-event.weight, event.phrase))


def select_events(tags: Sequence[LabelScore], lexicon: Lexicon, selection: EventSelection) -> CaptionResult:
    """Select the events of an image from its labels, or abstain with a reason and guesses."""
    events = tags_to_events(tags, lexicon)
    score = max((event.confidence for event in events), default=0.0)
    min_weight = selection.min_relative_weight * max((event.weight for event in events), default=0.0)
    kept = tuple(event for event in events if event.weight >= min_weight)[: selection.max_events]
    if kept and score > 0 and score >= selection.min_confidence:
        return CaptionResult(kept, "", "", score)
    top = ", ".join(f"{tag.label} {tag.probability:.2f}" for tag in sorted(tags, key=lambda tag: -tag.probability)[:3])
    silent = sum(tag.probability for tag in tags if tag.vocabulary == IMAGENET and not lexicon.get((IMAGENET, tag.index)))
    if silent >= SILENT_FRACTION:
        return CaptionResult((), "NO_SOUND", f"what is seen makes no sound: {top}", score, kept)
    reason = f"no sound is likely enough (best {score:.2f} of {selection.min_confidence:.2f}): {top}"
    return CaptionResult((), "LOW_CONFIDENCE", reason, score, kept)


def label_events(tags: Sequence[LabelScore], count: int) -> tuple[SoundEvent, ...]:
    """The `count` likeliest ImageNet labels, silent ones too, as events with their name and probability."""
    best = sorted((tag for tag in tags if tag.vocabulary == IMAGENET), key=lambda tag: (-tag.probability, tag.index))[:count]
    return tuple(SoundEvent(tag.label, tag.label, True, 1.0, tag.probability) for tag in best)


@CAPTIONERS.register("tagger")
class TaggerCaptioner(Captioner[list[LabelScore]]):
    """Captioner from labels of EfficientNet-Lite classifiers and a lexicon. A prediction is the list of labels.

    Args:
        config: group `caption.tagger`.
        options: options of the stage.
        lexicon: sound events of each label; the default is the lexicon of the package.
        prior: mean probability of each ImageNet index; the default is the prior of the package.
    """

    config_class = TaggerConfig
    name = "tagger"
    version = 1
    schema = pa.schema(
        [
            pa.field("vocabulary", pa.list_(pa.string())),
            pa.field("index", pa.list_(pa.int32())),
            pa.field("label", pa.list_(pa.string())),
            pa.field("probability", pa.list_(pa.float32())),
        ]
    )

    def __init__(
        self,
        config: TaggerConfig,
        options: CaptionOptions,
        lexicon: Lexicon | None = None,
        prior: Mapping[int, float] | None = None,
    ) -> None:
        from pipeline_steps.models.vision.efficientnet_lite import EfficientNetLite0, EfficientNetLite3
        from pipeline_steps.models.vision.ssd_mobilenet_v2 import SsdMobileNetV2

        super().__init__(config, options)
        self.lexicon = load_lexicon() if lexicon is None else lexicon
        self.prior = load_label_prior() if prior is None else prior
        classes = {model.name: model for model in (EfficientNetLite0, EfficientNetLite3)}
        names, assets = sorted(set(config.models)), options.assets
        self._classifiers = [classes[name](assets, framing=crop) for name in names for crop in config.crops]
        self._detectors = [SsdMobileNetV2(assets) for _ in config.detectors]
        self._models = [*self._classifiers, *self._detectors]

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(sorted({model.family for model in self._models}))

    def load(self) -> Self:
        for model in self._models:
            model.load()
        return self

    def describe_prediction(self) -> dict[str, Any]:
        # Without the lexicon, which is applied afterwards: after an edit of the lexicon no image is processed again.
        models = [model.describe() for model in self._models]
        return {"name": self.name, "version": self.version, "models": models, "min_probability": self.config.min_probability}

    def describe_selection(self) -> dict[str, Any]:
        entries = {
            f"{vocabulary}/{index}": [[e.phrase, e.sound_source, e.visible, e.salience, e.audibility] for e in entries]
            for (vocabulary, index), entries in self.lexicon.items()
        }
        prior = fingerprint({str(index): value for index, value in self.prior.items()})
        rules = [*super().describe_selection()["rules"], self.config.prior_strength]
        if self.config.label_events:
            rules.append(self.config.label_events)
        return {"lexicon": fingerprint(entries), "prior": prior, "rules": rules}

    def predict(self, images: Sequence[ByteArray]) -> list[list[LabelScore]]:
        """Labels of each image with a probability of at least `min_probability`, by vocabulary and index."""
        min_probability = self.config.min_probability
        probabilities: FloatArray = np.mean(
            [classifier.probabilities(images) for classifier in self._classifiers], axis=0, dtype=np.float32
        )
        labels = [label.split(", ")[0] for label in self._classifiers[0].labels]
        result = []
        for row in probabilities:
            indices = np.flatnonzero(row >= min_probability)
            result.append([LabelScore(IMAGENET, int(index), labels[index], float(row[index])) for index in indices])
        for detector in self._detectors:
            for tags, detections in zip(result, detector.detect(images), strict=True):
                scores: dict[int, tuple[float, str]] = {}
                for detection in detections:  # the best of several boxes of a class counts
                    if detection.score > scores.get(detection.index, (min_probability, ""))[0]:
                        scores[detection.index] = (float(detection.score), detection.label)
                tags.extend(LabelScore(COCO, index, label, score) for index, (score, label) in sorted(scores.items()))
        return result

    def to_row(self, prediction: list[LabelScore]) -> dict[str, Any]:
        return {name: [getattr(tag, name) for tag in prediction] for name in self.schema.names}

    def from_row(self, row: Mapping[str, Any]) -> list[LabelScore]:
        return [LabelScore(*values) for values in zip(*(row[name] for name in self.schema.names), strict=True)]

    def caption(self, prediction: list[LabelScore]) -> CaptionResult:
        tags = discount_label_prior(prediction, self.prior, self.config.prior_strength)
        caption = select_events(tags, self.lexicon, self.options.selection)
        if not caption.events or not self.config.label_events:
            return caption
        known = {event.phrase for event in caption.events}
        added = [event for event in label_events(tags, self.config.label_events) if event.phrase not in known]
        return replace(caption, events=(*caption.events, *added))
