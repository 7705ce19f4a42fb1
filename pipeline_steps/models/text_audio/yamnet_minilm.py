"""Text-audio encoder `yamnet_minilm`: YAMNet encodes audio and MiniLM encodes texts as vectors over AudioSet's 521 tags.

No part of it was trained on pairs of audio and text, so it is not a CLAP model. A text vector is a softmax over the MiniLM
similarities between the text and the names of the tags. An audio vector is the tag posteriors of YAMNet. Both are unit
vectors and are compared by inner product. A vector depends on its own text or clip alone.

Text pooling `plain` is the baseline: an audio vector is the sum of p(tag) x MiniLM(tag) over the 20 best tags, and a text
vector is the MiniLM vector (384 dimensions).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.text_audio.audioset_phrases import hand_written_phrases
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS, CachedArtifact, TextAudioEncoder

STORED_RATE = 48_000
PROMPTS = ("{}", "the sound of {}")
"""Prompts whose vectors are averaged, for tag names and for queries."""
PLAIN_TAGS = 20
QUIETEST, LOUDEST = 10 ** (-30 / 20), 10 ** (-14 / 20)
"""RMS range in which the level of a clip is not changed."""

TAGS = 521

TextPooling = Literal["tags", "plain"]


def tag_phrases(name: str) -> list[str]:
    """A tag's display name and its comma-separated synonyms: "Chicken, rooster" -> itself, "Chicken", "rooster"."""
    parts = [part.strip() for part in name.replace("(", ",").replace(")", ",").split(",")]
    return list(dict.fromkeys([name, *(part for part in parts if part)]))


def tag_prompts(name: str) -> list[str]:
    """Every prompt for a tag's name and its synonyms."""
    return [prompt.format(phrase) for phrase in tag_phrases(name) for prompt in PROMPTS]


def normalize_level(samples: FloatArray) -> FloatArray:
    """Scale a clip whose RMS lies outside -30 to -14 dBFS to the nearer bound.

    YAMNet's input, log(mel + 0.001), depends on the level: the offset 0.001 covers quiet clips, and loud clips resemble noise.
    """
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0
    if rms == 0.0 or QUIETEST <= rms <= LOUDEST:
        return samples
    return np.asarray(samples * (min(max(rms, QUIETEST), LOUDEST) / rms), np.float32)


def windows(samples_16k: FloatArray) -> FloatArray:
    """Windows [N, 15600] of 0.975 s every 0.48 s; the last window ends with the clip, a short clip is repeated to fill one.

    There is no random crop and no padding with silence, so the same file always gives the same windows.
    """
    from pipeline_steps.models.audio.yamnet import HOP_SAMPLES, MIN_SAMPLES

    samples = np.asarray(samples_16k, np.float32)
    if len(samples) <= MIN_SAMPLES:
        return np.resize(samples if len(samples) else np.zeros(1, np.float32), MIN_SAMPLES)[None]
    last = len(samples) - MIN_SAMPLES
    starts = [*range(0, last, HOP_SAMPLES), last]
    return np.stack([samples[start : start + MIN_SAMPLES] for start in starts])


def window_weights(audio_windows: FloatArray, power: float) -> FloatArray:
    """Weights [N] of windows [N, T]: RMS ** power, with sum 1; equal weights if all windows are silent."""
    loudness = np.sqrt(np.mean(np.square(audio_windows, dtype=np.float64), axis=1)) ** power
    total = loudness.sum()
    return (loudness / total if total > 0 else np.full(len(audio_windows), 1.0 / len(audio_windows))).astype(np.float32)


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


class YamnetMiniLMEncoderConfig(StageConfig):
    """Group `embed.yamnet_minilm`."""

    text_pooling: TextPooling = Field(default="tags", description="tags: softmax over tags; plain: MiniLM, the baseline")
    temperature: float = Field(
        default=0.06, ge=0.005, le=1, description="temperature of the softmax over tag similarities of a text"
    )
    phrase_weight: float = Field(default=0.5, ge=0, le=1, description="weight of a tag's hand-written phrases against its name")
    loudness_power: float = Field(default=0.5, ge=0, le=2, description="windows are averaged with weights RMS ** power")


@TEXT_AUDIO_ENCODERS.register("yamnet_minilm")
class YamnetMiniLMEncoder(TextAudioEncoder):
    """Text-audio encoder built from YAMNet and MiniLM.

    The cache keeps tag posteriors and MiniLM vectors, so a change of `temperature` or `phrase_weight` runs no network on audio.
    """

    name = "bridge"
    family = "yamnet+minilm"
    families = ("minilm", "yamnet")
    version = 2
    config_class = YamnetMiniLMEncoderConfig
    recorded_as: ClassVar = {"text_pooling": "recipe"}
    vectors_need_weights = True
    rebuild_tolerance = 1e-3
    model_names = ("YAMNet", "MiniLM")
    config: YamnetMiniLMEncoderConfig

    def __init__(self, config: YamnetMiniLMEncoderConfig, layout: ProjectPaths) -> None:
        from pipeline_steps.models.audio.yamnet import YamNet
        from pipeline_steps.models.text_audio.minilm import MiniLM

        super().__init__(config, layout)
        self.plain = config.text_pooling == "plain"
        self.yamnet = YamNet(layout.assets)
        self.minilm = MiniLM(layout.assets)
        self._tag_vectors: FloatArray | None = None

    @property
    def dimension(self) -> int:
        return self.minilm.dimension if self.plain else TAGS

    def meta(self) -> dict[str, Any]:
        return {"space": f"yamnet-minilm-{self.name}/{self.config.text_pooling}"}

    def describe_audio(self) -> dict[str, Any]:
        kind = "plain" if self.plain else "levelled"
        model = self.yamnet.describe()
        return {"version": self.version, "model": model, "windows": kind, "loudness_power": self.config.loudness_power}

    def describe_texts(self) -> list[Any]:
        return [self.minilm.describe(), PROMPTS, self.config.text_pooling]

    def describe_tags(self) -> dict[str, Any]:
        """Everything that shapes the text vectors of the tags."""
        phrases = [PROMPTS, self.config.phrase_weight, hand_written_phrases()]
        return {"version": self.version, "model": self.minilm.describe(), "phrases": fingerprint(phrases)}

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "family": self.family,
            "recipe": self.config.text_pooling,
            "temperature": self.config.temperature,
            "sounds": self.describe_audio(),
            "tags": self.describe_tags(),
        }

    def load(self) -> Self:
        self.yamnet.load()
        self.minilm.load()
        return self

    def prepare_audio(self, samples_48k: FloatArray) -> FloatArray:
        """Tag posteriors [521] of a clip: loudness-weighted mean over its windows.

        `plain`: unweighted mean over whole patches, without the tail, at the clip's own level.
        """
        import torch

        from pipeline_steps.models.audio.yamnet import HOP_SAMPLES, MIN_SAMPLES, SAMPLE_RATE

        samples = resample(samples_48k, STORED_RATE, SAMPLE_RATE)
        with torch.inference_mode():
            if self.plain:
                whole = max(0, len(samples) - MIN_SAMPLES) // HOP_SAMPLES * HOP_SAMPLES + MIN_SAMPLES
                patches = self.yamnet.frames(samples[:whole])
                weights = np.full(len(patches), 1.0 / len(patches), np.float32)
            else:
                cut = windows(normalize_level(samples))
                patches = np.concatenate([self.yamnet.frames(window) for window in cut])
                weights = window_weights(cut, self.config.loudness_power)
            logits = self.yamnet(patches)[0].cpu().numpy().astype(np.float64)
        probabilities = 1.0 / (1.0 + np.exp(-np.clip(logits, -60.0, 60.0)))
        # Not a BLAS product: its last digits depend on the number of threads.
        return np.asarray((weights[:, None] * probabilities).sum(axis=0), np.float32)

    def audio_rows(self, prepared: Sequence[FloatArray]) -> list[FloatArray]:
        """Tag posteriors, one array [521] per clip."""
        return list(prepared)

    def audio_vectors(self, rows: FloatArray) -> FloatArray:
        """Posteriors [N, 521] -> unit vectors [N, dimension].

        `tags`: the square root of the posteriors (Hellinger), so that one strong tag does not outweigh the others.
        """
        if self.plain:
            return baseline_audio_embeddings(rows, self.minilm.encode_batched(self.yamnet.class_names))
        return l2_normalize(np.sqrt(np.maximum(rows, 0.0)))

    def text_rows(self, texts: Sequence[str]) -> FloatArray:
        """MiniLM vectors [N, 384] of texts: the mean over the prompts; for `plain`, of the text itself."""
        if self.plain or not texts:
            return self.minilm.encode(texts)
        prompted = self.minilm.encode([prompt.format(text) for text in texts for prompt in PROMPTS])
        return l2_normalize(prompted.reshape(len(texts), len(PROMPTS), -1).mean(axis=1))

    def text_vectors(self, rows: FloatArray) -> FloatArray:
        """MiniLM vectors [N, 384] -> unit vectors [N, dimension]: softmax over the similarities to the tags."""
        if self.plain:
            return rows
        # einsum, not a BLAS product: its last digits depend on the number of threads.
        similarity = np.einsum("nd,td->nt", rows, self.tag_vectors())
        return l2_normalize(softmax_over_tags(similarity, self.config.temperature))

    def tag_vectors(self) -> FloatArray:
        """MiniLM vectors [521, 384] of the tags: mean over prompts of the name, mixed with the hand-written phrases."""
        if self._tag_vectors is None:
            written = hand_written_phrases()
            names = self.yamnet.class_names
            needed = sorted({text for name in names for text in (*tag_prompts(name), *written.get(name, []))})
            encoded = dict(zip(needed, self.minilm.encode_batched(needed), strict=True))
            rows = []
            for name in names:
                row = l2_normalize(np.mean([encoded[text] for text in tag_prompts(name)], axis=0, keepdims=True))
                if name in written:
                    scene = l2_normalize(np.mean([encoded[text] for text in written[name]], axis=0, keepdims=True))
                    row = l2_normalize((1.0 - self.config.phrase_weight) * row + self.config.phrase_weight * scene)
                rows.append(row[0])
            self._tag_vectors = np.stack(rows)
        return self._tag_vectors

    def set_tag_embeddings(self, vectors: FloatArray) -> None:
        """Set tag vectors [521, 384] that were computed with the same `describe_tags`.

        Raises:
            ValueError: the shape is another one.
        """
        if vectors.shape != (TAGS, self.minilm.dimension):
            raise ValueError(f"tag vectors have shape {vectors.shape}, expected {(TAGS, self.minilm.dimension)}")
        self._tag_vectors = vectors

    def text_artifact(self) -> CachedArtifact | None:
        """Tag vectors, flattened; `plain` needs none."""
        if self.plain:
            return None
        return CachedArtifact(
            "embed-tags",
            "tags",
            pa.schema([pa.field("vector", pa.list_(pa.float32()))]),
            self.describe_tags(),
            lambda: self.tag_vectors().ravel(),
            lambda flat: self.set_tag_embeddings(np.asarray(flat, np.float32).reshape(TAGS, -1)),
        )
