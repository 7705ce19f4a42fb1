"""Audio prompt: prompt embeddings of a sound, from the names of its sources. Needs no training.

A source of weight w, relative to the strongest one, has the text encoder's states `w * states(source) + (1 - w) * states("")`.
One source fills the prompt. Several share its tokens, so that a query of cross-attention can attend to one of them.
A text-to-image backbone reads both like any prompt.
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
    return [(row["source"], float(row["specificity"])) for row in _rows()]


@lru_cache(maxsize=1)
def source_groups() -> dict[str, str]:
    """Group of each source in the AudioSet ontology: that of the first tag that names it."""
    return {row["source"]: row["group"] for row in reversed(_rows())}


def _rows() -> list[dict[str, str]]:
    text = resources.files("pipeline_steps.models.audio").joinpath(SOURCES_FILE).read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


@dataclass(frozen=True, slots=True)
class AudioPrompt:
    """Prompt of a sound.

    Attributes:
        template: prompt of one source; `{}` stands for its name. Without `{}` it is the prompt of every sound.
        max_sources: sources in a prompt, each of another group of the ontology: "a wolf" beside "a dog" names the same sound.
        min_weight: sources with a smaller weight, relative to the first, are left out.
        quiet_db, loud_db: LUFS between which the weight of the sources grows from `quiet_weight` to 1.
        quiet_weight: weight of the sources of a quiet sound; the rest is that of the empty prompt.
    """

    template: str = "{}"
    max_sources: int = 2
    min_weight: float = 0.5
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
        floor = max(max(weights.values()) * self.min_weight, 1e-12)
        first_of_group: dict[str, tuple[str, float]] = {}
        for source, weight in sorted(weights.items(), key=lambda item: -item[1]):
            if weight >= floor:
                first_of_group.setdefault(source_groups()[source], (source, weight))
        kept = list(first_of_group.values())[: self.max_sources]
        total = sum(weight for _, weight in kept)
        return [(source, weight / total) for source, weight in kept]

    def loudness_weight(self, loudness: float) -> float:
        """Weight of the sources of a sound of this loudness in LUFS."""
        position = (loudness - self.quiet_db) / (self.loud_db - self.quiet_db)
        return self.quiet_weight + (1.0 - self.quiet_weight) * min(1.0, max(0.0, position))

    def weighted_texts(self, tags: torch.Tensor, loudness: float) -> list[tuple[str, float]]:
        """Prompts of the sources, strongest first, with weights from 0 to 1; the empty prompt if there is none.

        The weight of the strongest is that of the loudness.
        """
        if not self.reads_audio:
            return [(self.template, 1.0)]
        sources = self.sources(tags)
        if not sources:
            return [("", 1.0)]
        scale = self.loudness_weight(loudness) / sources[0][1]
        return [(self.template.format(source), scale * weight) for source, weight in sources]

    def embed(self, clips: Sequence[AudioTokens], encode_prompt: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Prompt embeddings [N, L, width]; `encode_prompt` returns those [1, L, width] of a text."""
        empty = encode_prompt("")
        texts = [self.weighted_texts(clip.tags, clip.loudness) for clip in clips]
        return torch.cat(
            [share_tokens([torch.lerp(empty, encode_prompt(text), weight) for text, weight in named]) for named in texts]
        )


def share_tokens(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Token states [..., L, width] of several texts with the same number of tokens each: the first L / n of each of n texts."""
    length, count = states[0].shape[-2], len(states)
    ends = [length * (i + 1) // count for i in range(count)]
    return torch.cat([part[..., : end - start, :] for part, start, end in zip(states, [0, *ends], ends, strict=False)], -2)
