"""Audio prompt: prompt embeddings of a sound, from the names of its sources. Needs no training.

The embeddings are a weighted mean of the text encoder's token states: those of the sources that the tags name, and those of the
empty prompt for what is missing to full loudness. A text-to-image backbone reads them like any prompt.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import torch

from pipeline_steps.diffusion.audio_tokens import AudioTokens

SOURCES_FILE = "tag_sources.csv"
"""Source of each AudioSet tag, as one would draw it: "Moo" -> "a cow". Tags of places and of noise have none."""


@lru_cache(maxsize=1)
def tag_sources() -> list[tuple[str, float]]:
    """Source and specificity of each of the 521 tags; general tags ("Animal") have a small specificity, places 0."""
    text = resources.files("pipeline_steps.models.audio").joinpath(SOURCES_FILE).read_text(encoding="utf-8")
    return [(row["source"], float(row["specificity"])) for row in csv.DictReader(io.StringIO(text))]


@dataclass(frozen=True, slots=True)
class AudioPrompt:
    """Prompt of a sound.

    Attributes:
        template: prompt of one source; `{}` stands for its name. Without `{}` it is the prompt of every sound.
        max_sources: sources in a prompt.
        min_weight: sources with a smaller weight, relative to the first, are left out.
        quiet_db, loud_db: LUFS between which the weight of the sources grows from `quiet_weight` to 1.
        quiet_weight: weight of the sources of a quiet sound; the rest is that of the empty prompt.
    """

    template: str = "{}"
    max_sources: int = 2
    min_weight: float = 0.75
    quiet_db: float = -50.0
    loud_db: float = -25.0
    quiet_weight: float = 0.2

    @property
    def reads_audio(self) -> bool:
        """Whether the prompt depends on the sound."""
        return "{}" in self.template

    def settings(self) -> dict[str, Any]:
        """Arguments that create it again."""
        return asdict(self)

    def sources(self, tags: torch.Tensor) -> list[tuple[str, float]]:
        """Sources of tag probabilities [521] with weights of sum 1, largest first; empty if no tag names a source."""
        weights: dict[str, float] = {}
        for (source, specificity), probability in zip(tag_sources(), tags.tolist(), strict=True):
            if source:
                weights[source] = max(weights.get(source, 0.0), specificity * probability)
        best = sorted(weights.items(), key=lambda item: -item[1])[: self.max_sources]
        kept = [(source, weight) for source, weight in best if weight > 0 and weight >= self.min_weight * best[0][1]]
        total = sum(weight for _, weight in kept)
        return [(source, weight / total) for source, weight in kept]

    def loudness_weight(self, loudness: float) -> float:
        """Weight of the sources of a sound of this loudness in LUFS."""
        position = (loudness - self.quiet_db) / (self.loud_db - self.quiet_db)
        return self.quiet_weight + (1.0 - self.quiet_weight) * min(1.0, max(0.0, position))

    def weighted_texts(self, tags: torch.Tensor, loudness: float) -> list[tuple[str, float]]:
        """Prompts with weights of sum 1, the empty one last."""
        if not self.reads_audio:
            return [(self.template, 1.0)]
        scale = self.loudness_weight(loudness)
        texts = [(self.template.format(source), scale * weight) for source, weight in self.sources(tags)]
        rest = 1.0 - sum(weight for _, weight in texts)
        return [*texts, ("", rest)] if rest > 1e-6 else texts

    def all_texts(self) -> list[str]:
        """Every text that `weighted_texts` can return."""
        if not self.reads_audio:
            return [self.template]
        return ["", *sorted({self.template.format(source) for source, specificity in tag_sources() if source and specificity})]

    def mixture_texts(self, tracks: Sequence[tuple[torch.Tensor, float]], loudness: float) -> list[tuple[str, float]]:
        """Prompts of a mixture whose tracks are known, with weights of sum 1, the empty one last.

        Each track is named by its own tags. Its weight is proportional to its amplitude: 6 dB halve it. The weight of a track
        without a source belongs to the empty prompt.

        Args:
            tracks: tag probabilities [521] and LUFS of each track after its gain.
            loudness: LUFS of the mixture.
        """
        if not self.reads_audio:
            return [(self.template, 1.0)]
        amplitudes = [10.0 ** (level / 20.0) for _, level in tracks]
        scale = self.loudness_weight(loudness) / sum(amplitudes)
        texts: dict[str, float] = {}
        for (tags, _), amplitude in zip(tracks, amplitudes, strict=True):
            for source, weight in self.sources(tags):
                text = self.template.format(source)
                texts[text] = texts.get(text, 0.0) + scale * amplitude * weight
        rest = 1.0 - sum(texts.values())
        return [*texts.items(), ("", rest)] if rest > 1e-6 else list(texts.items())

    def embed(self, clips: Sequence[AudioTokens], encode_prompt: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Prompt embeddings [N, L, width]; `encode_prompt` returns those [1, L, width] of a text."""
        return torch.cat([blend(self.weighted_texts(clip.tags, clip.loudness), encode_prompt) for clip in clips])


def blend(texts: Sequence[tuple[str, float]], encode_prompt: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Weighted sum [1, L, width] of the embeddings of texts."""
    return torch.stack([weight * encode_prompt(text) for text, weight in texts]).sum(0)
