"""The embedded text-audio space: AudioSet's 521 tags are the common tongue of YAMNet (sounds) and MiniLM (texts).

Called bridge and never CLAP: no network was trained on pairs of sounds and texts here. A text is described by how near it
is to each tag's name (softmax over MiniLM similarities), a sound by YAMNet's tag posteriors; both are unit vectors over
the tags and meet by inner product. Both halves are fixed: a vector depends on its own text or sound alone.

`plain` keeps the simple recipe of the first trials as the baseline: sound = sum over its 20 best tags of p(tag) x
MiniLM(tag), in MiniLM's own 384 dimensions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.models.audio.yamnet import HOP_SAMPLES, MIN_SAMPLES, SAMPLE_RATE, YamNet
from pipeline_steps.models.text_audio.minilm import MiniLM

STORED_RATE = 48_000
PROMPTS = ("{}", "the sound of {}")
"""Phrasings whose vectors are averaged, for tag names and for queries."""
PHRASES_FILE = "audioset_phrases.csv"
"""Hand-written phrases that say what makes the sound of a tag whose name alone does not: "Moo" -> "a cow mooing"."""
PLAIN_TAGS = 20
QUIETEST, LOUDEST = 10 ** (-30 / 20), 10 ** (-14 / 20)
"""RMS between which a sound's level is left alone."""

TAGS = 521

Recipe = Literal["tags", "plain"]


def tag_phrases(name: str) -> list[str]:
    """A tag's display name and its comma-separated synonyms: "Chicken, rooster" -> itself, "Chicken", "rooster"."""
    parts = [part.strip() for part in name.replace("(", ",").replace(")", ",").split(",")]
    return list(dict.fromkeys([name, *(part for part in parts if part)]))


def tag_prompts(name: str) -> list[str]:
    """Every phrasing of a tag's name and its synonyms."""
    return [prompt.format(phrase) for phrase in tag_phrases(name) for prompt in PROMPTS]


@lru_cache(maxsize=1)
def hand_written_phrases() -> dict[str, list[str]]:
    """Tag name -> phrases of the packaged table."""
    text = resources.files("pipeline_steps.models.text_audio").joinpath(PHRASES_FILE).read_text(encoding="utf-8")
    return {row["name"]: row["phrases"].split("|") for row in csv.DictReader(io.StringIO(text))}


def normalize_level(samples: FloatArray) -> FloatArray:
    """A sound brought to an RMS between -30 and -14 dBFS when it lies outside; ordinary levels are left as they are.

    YAMNet's input, log(mel + 0.001), is not indifferent to level: whispers drown in the 0.001, loud sounds look like noise.
    """
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0
    if rms == 0.0 or QUIETEST <= rms <= LOUDEST:
        return samples
    return np.asarray(samples * (min(max(rms, QUIETEST), LOUDEST) / rms), np.float32)


def windows(samples_16k: FloatArray) -> FloatArray:
    """Windows [N, 15600] of 0.975 s, 0.48 s apart; the last one ends with the sound, and a short sound is repeated to fill one.

    Nothing is cropped at random and nothing is padded with silence, so the same file always gives the same windows.
    """
    samples = np.asarray(samples_16k, np.float32)
    if len(samples) <= MIN_SAMPLES:
        return np.resize(samples if len(samples) else np.zeros(1, np.float32), MIN_SAMPLES)[None]
    last = len(samples) - MIN_SAMPLES
    starts = [*range(0, last, HOP_SAMPLES), last]
    return np.stack([samples[start : start + MIN_SAMPLES] for start in starts])


def window_weights(sound_windows: FloatArray, power: float) -> FloatArray:
    """Weights [N] of windows [N, T]: RMS ** power, summing to 1. Silent windows say nothing about a sound."""
    loudness = np.sqrt(np.mean(np.square(sound_windows, dtype=np.float64), axis=1)) ** power
    total = loudness.sum()
    return (loudness / total if total > 0 else np.full(len(sound_windows), 1.0 / len(sound_windows))).astype(np.float32)


def softmax_over_tags(similarities: FloatArray, temperature: float) -> FloatArray:
    """softmax(similarities / temperature) along the last axis."""
    scaled = similarities.astype(np.float64) / temperature
    scaled = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(scaled / scaled.sum(axis=-1, keepdims=True), np.float32)


def baseline_audio_embeddings(posteriors: FloatArray, tag_vectors: FloatArray) -> FloatArray:
    """Baseline: L2(sum over the 20 best tags of p(tag) x MiniLM(tag)) [N, 384]."""
    kept = np.zeros_like(posteriors)
    best = np.argsort(-posteriors, axis=1, kind="stable")[:, :PLAIN_TAGS]
    np.put_along_axis(kept, best, np.take_along_axis(posteriors, best, 1), 1)
    return l2_normalize(kept @ tag_vectors)


class YamnetMiniLMEncoder:
    """`TextAudioEncoder` made of YAMNet and MiniLM.

    Args:
        assets: folder written by the `assets` stage.
        recipe: `tags` (521 dimensions) or `plain` (384 dimensions, the baseline).
        temperature: of the softmax over tag similarities of a text.
        phrase_weight: weight of a tag's hand-written phrases against its name, where it has any.
        loudness_power: windows are averaged with weights RMS ** power.
    """

    name = "bridge"
    family = "yamnet+minilm"
    families = ("minilm", "yamnet")
    version = 1

    def __init__(
        self,
        assets: Path,
        recipe: Recipe = "tags",
        temperature: float = 0.06,
        phrase_weight: float = 0.5,
        loudness_power: float = 0.5,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.temperature = temperature
        self.phrase_weight = phrase_weight
        self.loudness_power = loudness_power
        self.yamnet = YamNet(assets, device)
        self.minilm = MiniLM(assets, device)
        self._tag_vectors: FloatArray | None = None

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return self.minilm.dimension if self.recipe == "plain" else TAGS

    @property
    def parameters(self) -> dict[str, Any]:
        """What the constructor needs beside the assets to make this space again; `meta.json` keeps it."""
        return {
            "recipe": self.recipe,
            "temperature": self.temperature,
            "phrase_weight": self.phrase_weight,
            "loudness_power": self.loudness_power,
        }

    def describe_sounds(self) -> dict[str, Any]:
        """Everything but the sound that shapes its posteriors."""
        kind = "plain" if self.recipe == "plain" else "levelled"
        model = self.yamnet.describe()
        return {"version": self.version, "model": model, "windows": kind, "loudness_power": self.loudness_power}

    def describe_tags(self) -> dict[str, Any]:
        """Everything that shapes the tags' text vectors."""
        phrases = [PROMPTS, self.phrase_weight, hand_written_phrases()]
        return {"version": self.version, "model": self.minilm.describe(), "phrases": fingerprint(phrases)}

    def describe(self) -> dict[str, Any]:
        """Name, family, version, recipe, parameters and both models: the fingerprint of the space."""
        return {
            "name": self.name,
            "family": self.family,
            "recipe": self.recipe,
            "temperature": self.temperature,
            "sounds": self.describe_sounds(),
            "tags": self.describe_tags(),
        }

    def load(self) -> Self:
        """Read and check the weights of both models; calling it again does nothing."""
        self.yamnet.load()
        self.minilm.load()
        return self

    @torch.inference_mode()
    def posteriors(self, samples_48k: FloatArray) -> FloatArray:
        """Tag posteriors [521] of a mono 48 kHz sound: loudness-weighted mean over its windows.

        `plain`: unweighted mean over whole patches, the tail dropped, at the level the sound has.
        """
        samples = resample(samples_48k, STORED_RATE, SAMPLE_RATE)
        if self.recipe == "plain":
            whole = max(0, len(samples) - MIN_SAMPLES) // HOP_SAMPLES * HOP_SAMPLES + MIN_SAMPLES
            patches = self.yamnet.frames(samples[:whole])
            weights = np.full(len(patches), 1.0 / len(patches), np.float32)
        else:
            cut = windows(normalize_level(samples))
            patches = np.concatenate([self.yamnet.frames(window) for window in cut])
            weights = window_weights(cut, self.loudness_power)
        logits = self.yamnet(patches)[0].cpu().numpy().astype(np.float64)
        probabilities = 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))
        return np.asarray(weights @ probabilities, np.float32)

    def sounds_from_posteriors(self, posteriors: FloatArray) -> FloatArray:
        """Posteriors [N, 521] -> unit rows [N, dimension].

        `tags`: the square root of the posteriors (Hellinger), so that one loud tag does not drown the others.
        """
        if self.recipe == "plain":
            return baseline_audio_embeddings(posteriors, self.minilm.encode_batched(self.yamnet.class_names))
        return l2_normalize(np.sqrt(np.maximum(posteriors, 0.0)))

    def embed_prompts(self, texts: Sequence[str]) -> FloatArray:
        """MiniLM vectors [N, 384] of texts, averaged over the phrasings; for `plain`, of the text as it is."""
        if self.recipe == "plain" or not texts:
            return self.minilm.encode(texts)
        spoken = self.minilm.encode([prompt.format(text) for text in texts for prompt in PROMPTS])
        return l2_normalize(spoken.reshape(len(texts), len(PROMPTS), -1).mean(axis=1))

    def texts_from_prompted(self, prompted: FloatArray) -> FloatArray:
        """MiniLM vectors [N, 384] -> unit rows [N, dimension]: how near a text is to each tag."""
        if self.recipe == "plain":
            return prompted
        return l2_normalize(softmax_over_tags(prompted @ self.tag_vectors().T, self.temperature))

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Unit rows [N, dimension] of phrases such as "dog barking"."""
        return self.texts_from_prompted(self.embed_prompts(texts)) if texts else np.zeros((0, self.dimension), np.float32)

    def encode_sounds(self, sounds: Sequence[FloatArray]) -> FloatArray:
        """Unit rows [N, dimension] of mono 48 kHz sounds."""
        if not sounds:
            return np.zeros((0, self.dimension), np.float32)
        return self.sounds_from_posteriors(np.stack([self.posteriors(sound) for sound in sounds]))

    def tag_vectors(self) -> FloatArray:
        """MiniLM vectors [521, 384] of the tags: mean over phrasings of the name, mixed with the hand-written phrases."""
        if self._tag_vectors is None:
            written = hand_written_phrases()
            names = self.yamnet.class_names
            needed = sorted({text for name in names for text in (*tag_prompts(name), *written.get(name, []))})
            read = dict(zip(needed, self.minilm.encode_batched(needed), strict=True))
            rows = []
            for name in names:
                row = l2_normalize(np.mean([read[text] for text in tag_prompts(name)], axis=0, keepdims=True))
                if name in written:
                    scene = l2_normalize(np.mean([read[text] for text in written[name]], axis=0, keepdims=True))
                    row = l2_normalize((1.0 - self.phrase_weight) * row + self.phrase_weight * scene)
                rows.append(row[0])
            self._tag_vectors = np.stack(rows)
        return self._tag_vectors

    def set_tag_embeddings(self, vectors: FloatArray) -> None:
        """Take tag vectors computed before under the same `describe_tags`."""
        if vectors.shape != (TAGS, self.minilm.dimension):
            raise ValueError(f"tag vectors have shape {vectors.shape}, expected {(TAGS, self.minilm.dimension)}")
        self._tag_vectors = vectors
