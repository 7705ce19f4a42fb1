"""Captioner `text`: sound events from the words that came with an image (caption, title, tags). It reads no pixels.

Words are matched with the lexicon of captioner `tagger`, with synonyms of its labels, and with AudioSet's tags. If nothing
matches, the parts of the text are compared with the phrases of both by MiniLM.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline_steps.caption.captioners.base import CAPTIONERS, Captioner, CaptionOptions, CaptionResult, SoundEvent
from pipeline_steps.caption.lexicon import COCO, IMAGENET, Lexicon, LexiconEntry, load_lexicon, load_synonyms
from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.checksums import read_verified
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.hashing import fingerprint

LABELS_FILE = "imagenet_labels.txt"
"""Asset with the names of ImageNet's labels."""
MAX_WORDS = 6
"""Words of the longest term."""
MAX_PARTS = 8
"""Parts of a text that are compared by the text encoder."""
NEAREST_PHRASES = 2
"""Phrases per part of a text that the text encoder may find."""
COMMON_FRACTION = 0.2
"""A source stands for the phrases that occur at least this fraction as often with it as its most frequent phrase."""
NAMED_AUDIBILITY = 0.7
"""Audibility of a sound that the words name by its phrase, its source or a tag; the lexicon's values belong to labels."""
_WORD = re.compile(r"[^\W_]+")
_ARTICLES = frozenset(("a", "an", "the"))

Vocabulary = Mapping[str, Sequence[LexiconEntry]]
"""Normalized term -> its sounds; none for a silent thing."""


class TextConfig(StageConfig):
    """Group `caption.text`."""

    min_similarity: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="least cosine similarity of words and a term of the lexicon; 1 disables the encoder",
    )


class TextPrediction(NamedTuple):
    """Sounds that the words name. `matched`: a term was found, possibly that of a silent thing."""

    words: str
    matched: bool
    events: tuple[SoundEvent, ...]


def normalize(text: str) -> list[str]:
    """Words of a text in lower case and singular, without articles."""
    return [_singular(word) for word in _WORD.findall(text.casefold()) if word not in _ARTICLES]


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def build_vocabulary(
    lexicon: Lexicon,
    names: Mapping[tuple[str, int], Sequence[str]],
    tags: Mapping[str, Sequence[str]],
    synonyms: Mapping[str, str],
) -> dict[str, tuple[LexiconEntry, ...]]:
    """Terms with their sounds: names of labels, else tags of AudioSet, else phrases and sources of the lexicon.

    Args:
        lexicon: sounds of labels.
        names: synonyms of each label; the first label in COCO, then ImageNet with a name determines its sounds.
        tags: short names of a tag, separated by commas -> phrases.
        synonyms: term -> term with the same sounds, which replaces its own.
    """
    terms: dict[str, tuple[LexiconEntry, ...]] = {}

    def add(term: str, entries: Sequence[LexiconEntry]) -> None:
        terms.setdefault(" ".join(normalize(term)), tuple(entries))

    for rank in range(max(map(len, names.values()), default=0)):  # the first name of a label precedes all second names
        for key in sorted(names):
            if rank < len(names[key]):
                add(names[key][rank], lexicon.get(key, ()))
    for name, phrases in tags.items():
        parts = [part.strip().lower() for part in re.split(r"[,()]", name) if part.strip()]
        for phrase, term in (*zip(phrases, phrases, strict=True), *((phrases[0], part) for part in parts)):
            add(term, [LexiconEntry(phrase, parts[0], False, 1.0, NAMED_AUDIBILITY)])
    by_phrase: dict[str, list[LexiconEntry]] = {}
    by_source: dict[str, Counter[str]] = {}
    for entry in (entry for entries in lexicon.values() for entry in entries):
        by_phrase.setdefault(entry.phrase, []).append(entry)
        by_source.setdefault(entry.sound_source, Counter())[entry.phrase] += 1
    named = {phrase: _named(entries) for phrase, entries in by_phrase.items()}
    for phrase, entry in named.items():
        add(phrase, [entry])
    for source, counts in by_source.items():
        most = counts.most_common(1)[0][1]
        add(source, [named[phrase] for phrase, count in counts.most_common() if count >= COMMON_FRACTION * most])
    return terms | {" ".join(normalize(term)): terms[" ".join(normalize(means))] for term, means in synonyms.items()}


def _named(entries: Sequence[LexiconEntry]) -> LexiconEntry:
    """Entry of a phrase that the words name, itself or by its source, whichever label it belongs to."""
    salience = float(np.mean([entry.salience for entry in entries]))
    return replace(entries[0], salience=salience, audibility=NAMED_AUDIBILITY)


def find_terms(words: Sequence[str], vocabulary: Vocabulary) -> Iterator[str]:
    """Terms in a list of normalized words: from left to right, the longest first, without overlap."""
    place = 0
    while place < len(words):
        for length in range(min(MAX_WORDS, len(words) - place), 0, -1):
            term = " ".join(words[place : place + length])
            if term in vocabulary:
                yield term
                place += length
                break
        else:
            place += 1


@CAPTIONERS.register("text")
class TextCaptioner(Captioner[TextPrediction]):
    """Captioner from the words that came with an image. The confidence of an event is the audibility in the lexicon.

    Events that the text encoder found have it times the cosine similarity.
    """

    config_class = TextConfig
    name = "text"
    version = 1
    text_input = "required"
    schema = pa.schema(
        [
            pa.field("words", pa.string()),
            pa.field("matched", pa.bool_()),
            pa.field("phrase", pa.list_(pa.string())),
            pa.field("sound_source", pa.list_(pa.string())),
            pa.field("visible", pa.list_(pa.bool_())),
            pa.field("salience", pa.list_(pa.float64())),
            pa.field("confidence", pa.list_(pa.float64())),
        ]
    )

    def __init__(self, config: TextConfig, options: CaptionOptions, lexicon: Lexicon | None = None) -> None:
        from pipeline_steps.models.text_audio.minilm import MiniLM

        super().__init__(config, options)
        self.lexicon = load_lexicon() if lexicon is None else lexicon
        self._encoder = MiniLM(options.assets)
        self._vocabulary: Vocabulary = {}
        self._phrases: list[str] = []
        self._vectors: FloatArray | None = None

    @property
    def families(self) -> tuple[str, ...]:
        return (self._encoder.family,)

    def describe_prediction(self) -> dict[str, Any]:
        from pipeline_steps.models.text_audio.audioset_phrases import hand_written_phrases

        entries = {f"{vocabulary}/{index}": repr(entries) for (vocabulary, index), entries in self.lexicon.items()}
        return {
            "name": self.name,
            "version": self.version,
            "encoder": self._encoder.describe(),
            "lexicon": fingerprint([entries, hand_written_phrases(), load_synonyms()]),
            "min_similarity": self.config.min_similarity,
        }

    def load(self) -> Self:
        from pipeline_steps.models.text_audio.audioset_phrases import hand_written_phrases
        from pipeline_steps.models.vision.coco_labels import COCO_LABELS

        if not self._vocabulary:
            self._encoder.load()
            labels = read_verified(self.options.assets / LABELS_FILE).decode("utf-8").splitlines()
            names = {(IMAGENET, index): label.split(", ") for index, label in enumerate(labels)}
            names |= {(COCO, index): [name] for index, name in COCO_LABELS.items()}
            tags = hand_written_phrases()
            phrases = {entry.phrase for entries in self.lexicon.values() for entry in entries}
            self._phrases = sorted(phrases.union(*tags.values()))
            self._vocabulary = build_vocabulary(self.lexicon, names, tags, load_synonyms())
        return self

    def predict(self, images: Sequence[ByteArray]) -> list[TextPrediction]:
        return self.predict_with_text(images, [""] * len(images))

    def predict_with_text(self, images: Sequence[ByteArray], texts: Sequence[str]) -> list[TextPrediction]:
        return [self._predict(text) for text in texts]

    def _predict(self, text: str) -> TextPrediction:
        found = dict.fromkeys(find_terms(normalize(text), self._vocabulary), 1.0) or self._nearest_phrases(text)
        events: dict[str, SoundEvent] = {}
        for term, similarity in found.items():
            for entry in self._vocabulary[term]:
                confidence = entry.audibility * similarity
                if entry.phrase not in events or confidence > events[entry.phrase].confidence:
                    events[entry.phrase] = SoundEvent(
                        entry.phrase, entry.sound_source, entry.visible, entry.salience, confidence
                    )
        ordered = sorted(events.values(), key=lambda event: (-event.weight, event.phrase))
        return TextPrediction(text, bool(found), tuple(ordered))

    def _nearest_phrases(self, text: str) -> dict[str, float]:
        """Phrases that the text encoder finds, as terms with their similarities."""
        parts = [part for part in re.split(r"[.,;:|/()\n]+", text) if _WORD.search(part)][:MAX_PARTS]
        if not parts or self.config.min_similarity >= 1:
            return {}
        if self._vectors is None:
            self._vectors = self._encoder.encode_batched(self._phrases)
        found: dict[str, float] = {}
        for row in self._encoder.encode(parts) @ self._vectors.T:
            for index in np.argsort(-row, kind="stable")[:NEAREST_PHRASES]:
                if row[index] >= self.config.min_similarity:
                    term = " ".join(normalize(self._phrases[index]))
                    found[term] = max(float(row[index]), found.get(term, 0.0))
        return found

    def to_row(self, prediction: TextPrediction) -> dict[str, Any]:
        lists = {name: [getattr(event, name) for event in prediction.events] for name in self.schema.names[2:]}
        return {"words": prediction.words, "matched": prediction.matched, **lists}

    def from_row(self, row: Mapping[str, Any]) -> TextPrediction:
        events = zip(*(row[name] for name in self.schema.names[2:]), strict=True)
        return TextPrediction(row["words"], row["matched"], tuple(SoundEvent(*values) for values in events))

    def caption(self, prediction: TextPrediction) -> CaptionResult:
        words, selection = prediction.words[:100], self.options.selection
        if not words:
            return CaptionResult((), "NO_TEXT", "no words came with the image", 0.0)
        if not prediction.events:
            if prediction.matched:
                return CaptionResult((), "NO_SOUND", f"what the words name makes no sound: {words}", 0.0)
            return CaptionResult((), "LOW_CONFIDENCE", f"the words name no known sound: {words}", 0.0)
        min_weight = selection.min_relative_weight * prediction.events[0].weight
        kept = tuple(event for event in prediction.events if event.weight >= min_weight)[: selection.max_events]
        score = max(event.confidence for event in kept)
        if score >= selection.min_confidence:
            return CaptionResult(kept, "", "", score)
        reason = f"no sound is likely enough (best {score:.2f} of {selection.min_confidence:.2f}): {words}"
        return CaptionResult((), "LOW_CONFIDENCE", reason, score, kept)
