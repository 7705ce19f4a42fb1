"""The embedded text-audio space: AudioSet's 521 tags are the common tongue of YAMNet (sounds) and MiniLM (texts).

Called bridge and never CLAP: no network was trained on pairs of sounds and texts here. A text is described by how near it
is to each tag's name (softmax over MiniLM similarities), a sound by YAMNet's tag posteriors; both are unit vectors over
the tags and meet by inner product. Both halves are fixed: a vector depends on its own text or sound alone.

`plain` keeps the simple recipe of the first trials as the baseline: sound = sum over its 20 best tags of p(tag) x
MiniLM(tag), in MiniLM's own 384 dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline_steps.audio.resample import resample
from pipeline_steps.encoders.minilm import MiniLM
from pipeline_steps.encoders.protocols import FloatArray
from pipeline_steps.encoders.yamnet import HOP_SAMPLES, MIN_SAMPLES, SAMPLE_RATE, YamNet

STORED_RATE = 48_000
PROMPTS = ("{}", "the sound of {}", "{} sound")
"""Phrasings of a tag's name whose vectors are averaged."""
QUERY_PROMPTS = ("{}", "the sound of {}")
"""Phrasings of a query whose vectors are averaged."""
PLAIN_TAGS = 20

Recipe = Literal["tags", "plain"]
TextEncoder = Callable[[Sequence[str]], FloatArray]


def unit_rows(rows: FloatArray) -> FloatArray:
    """Rows divided by their L2 norm; a zero row stays zero, so that whoever admits vectors can see it."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros(rows.shape, np.float64), where=norms > 0).astype(np.float32)


def tag_phrases(name: str) -> list[str]:
    """A tag's display name and its comma-separated synonyms: "Chicken, rooster" -> itself, "Chicken", "rooster"."""
    parts = [part.strip() for part in name.replace("(", ",").replace(")", ",").split(",")]
    return list(dict.fromkeys([name, *(part for part in parts if part)]))


def tag_prompts(name: str) -> list[str]:
    """Every phrasing whose mean describes a tag."""
    return [prompt.format(phrase) for phrase in tag_phrases(name) for prompt in PROMPTS]


def whole_windows(samples_16k: FloatArray, min_windows: int = 1) -> FloatArray:
    """A sound repeated from its start until it fills whole YAMNet windows (0.975 s, hop 0.48 s), at least `min_windows`.

    Nothing is cropped and nothing is padded with silence, so the same file always gives the same windows.
    """
    samples = np.asarray(samples_16k, np.float32)
    hops = max(min_windows - 1, -(-max(0, len(samples) - MIN_SAMPLES) // HOP_SAMPLES))
    return np.resize(samples, MIN_SAMPLES + hops * HOP_SAMPLES) if len(samples) else np.zeros(MIN_SAMPLES, np.float32)


def window_weights(samples_16k: FloatArray, power: float) -> FloatArray:
    """Weights [N] of the windows of `whole_windows`: RMS ** power, summing to 1. Silent windows say nothing about a sound."""
    count = 1 + (len(samples_16k) - MIN_SAMPLES) // HOP_SAMPLES
    windows = np.stack([samples_16k[i * HOP_SAMPLES : i * HOP_SAMPLES + MIN_SAMPLES] for i in range(count)]).astype(np.float64)
    loudness = np.sqrt((windows**2).mean(1)) ** power
    total = loudness.sum()
    return (loudness / total if total > 0 else np.full(count, 1.0 / count)).astype(np.float32)


def softmax_over_tags(similarities: FloatArray, temperature: float) -> FloatArray:
    """softmax(similarities / temperature) along the last axis."""
    scaled = similarities.astype(np.float64) / temperature
    scaled = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return (scaled / scaled.sum(axis=-1, keepdims=True)).astype(np.float32)


def plain_sounds(posteriors: FloatArray, tag_vectors: FloatArray) -> FloatArray:
    """Baseline: L2(sum over the 20 best tags of p(tag) x MiniLM(tag)) [N, 384]."""
    kept = np.zeros_like(posteriors)
    best = np.argsort(-posteriors, axis=1, kind="stable")[:, :PLAIN_TAGS]
    np.put_along_axis(kept, best, np.take_along_axis(posteriors, best, 1), 1)
    return unit_rows(kept @ tag_vectors)


class Bridge:
    """`TextAudioEncoder` made of YAMNet and MiniLM.

    Args:
        assets: folder written by the `assets` stage.
        recipe: `tags` (521 dimensions) or `plain` (384 dimensions, the baseline).
        temperature: of the softmax over tag similarities of a text.
        loudness_power: windows are averaged with weights RMS ** power.
        min_windows: short sounds are repeated to this many windows.
    """

    name = "bridge"
    family = "yamnet+minilm"
    families = ("minilm", "yamnet")
    version = 1

    def __init__(
        self,
        assets: Path,
        recipe: Recipe = "tags",
        temperature: float = 0.05,
        loudness_power: float = 0.5,
        min_windows: int = 1,
        device: str = "cpu",
    ) -> None:
        self.recipe = recipe
        self.temperature = temperature
        self.loudness_power = loudness_power
        self.min_windows = min_windows
        self.yamnet = YamNet(assets, device)
        self.minilm = MiniLM(assets, device)
        self._tag_vectors: FloatArray | None = None

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return self.minilm.dimension if self.recipe == "plain" else 521

    def describe_sounds(self) -> dict[str, Any]:
        """Everything but the sound that shapes its posteriors."""
        return {
            "version": self.version,
            "model": self.yamnet.describe(),
            "loudness_power": self.loudness_power,
            "min_windows": self.min_windows,
        }

    def describe(self) -> dict[str, Any]:
        """Name, family, version, recipe, parameters and both models: the fingerprint of the space."""
        return {
            "name": self.name,
            "family": self.family,
            "recipe": self.recipe,
            "temperature": self.temperature,
            "prompts": [PROMPTS, QUERY_PROMPTS],
            "sounds": self.describe_sounds(),
            "texts": self.minilm.describe(),
        }

    def load(self) -> Bridge:
        """Read and check the weights of both models; calling it again does nothing."""
        self.yamnet.load()
        self.minilm.load()
        return self

    def posteriors(self, samples_48k: FloatArray) -> FloatArray:
        """Tag posteriors [521] of a mono 48 kHz sound: loudness-weighted mean over its windows."""
        samples = whole_windows(resample(samples_48k, STORED_RATE, SAMPLE_RATE), self.min_windows)
        logits = self.yamnet(self.yamnet.frames(samples))[0].detach().cpu().numpy().astype(np.float64)
        probabilities = 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))
        return (window_weights(samples, self.loudness_power).astype(np.float64) @ probabilities).astype(np.float32)

    def sounds_from_posteriors(self, posteriors: FloatArray, encode: TextEncoder | None = None) -> FloatArray:
        """Posteriors [N, 521] -> unit rows [N, dimension].

        `tags`: the square root of the posteriors, so that the inner product is a Bhattacharyya-like affinity and one loud tag
        does not drown the others.
        """
        if self.recipe == "plain":
            return plain_sounds(posteriors, (encode or self.minilm.encode)(self.yamnet.class_names))
        return unit_rows(np.sqrt(np.maximum(posteriors, 0.0)))

    def texts_needed(self, texts: Sequence[str]) -> list[str]:
        """Every string MiniLM has to read for these texts (a memo can answer most of them)."""
        if self.recipe == "plain":
            return list(dict.fromkeys([*texts, *self.yamnet.class_names]))
        prompts = [prompt for name in self.yamnet.class_names for prompt in tag_prompts(name)]
        return list(dict.fromkeys([prompt.format(text) for text in texts for prompt in QUERY_PROMPTS] + prompts))

    def encode_texts(self, texts: Sequence[str], encode: TextEncoder | None = None) -> FloatArray:
        """Unit rows [N, dimension] of texts.

        Args:
            texts: phrases such as "dog barking".
            encode: stands in for MiniLM, e.g. one that looks into a memo first.
        """
        read = encode or self.minilm.encode
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        if self.recipe == "plain":
            return read(texts)
        queries = unit_rows(np.mean([read([prompt.format(text) for text in texts]) for prompt in QUERY_PROMPTS], axis=0))
        return unit_rows(softmax_over_tags(queries @ self._tags(read).T, self.temperature))

    def encode_sounds(self, sounds: Sequence[FloatArray]) -> FloatArray:
        """Unit rows [N, dimension] of mono 48 kHz sounds."""
        if not sounds:
            return np.zeros((0, self.dimension), np.float32)
        return self.sounds_from_posteriors(np.stack([self.posteriors(sound) for sound in sounds]))

    def _tags(self, read: TextEncoder) -> FloatArray:
        if self._tag_vectors is None:
            rows = [unit_rows(read(tag_prompts(name)).mean(0, keepdims=True))[0] for name in self.yamnet.class_names]
            self._tag_vectors = np.stack(rows)
        return self._tag_vectors
