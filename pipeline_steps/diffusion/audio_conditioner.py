"""From sound features to the tokens that the denoiser attends to.

A fixed part (mean, principal axes and scales of training sounds, fitted without labels) brings 1024-d frames and 521 tag
logits to a few numbers of like size: with a few hundred sounds, a learned projection of the raw features would learn the sounds
by heart. A small transformer then mixes one summary token (tags and loudness) and `frames` time tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pipeline_steps.diffusion.audio_features import FEATURE_WIDTH, TAGS, AudioFeatures

LEVEL_CENTRE_DB = -25.0
LEVEL_SCALE_DB = 12.0
ALIKE = 1e-5
"""Deviation of rows, in their root mean square, that is no more than rounding."""


@dataclass(frozen=True, slots=True)
class ConditionerInput:
    """Input of the conditioner for N sounds: frames [N, T, P] and summary [N, P + S + 2]."""

    frames: torch.Tensor
    summary: torch.Tensor

    def __len__(self) -> int:
        return len(self.frames)

    def to(self, device: torch.device | str) -> ConditionerInput:
        """The same on a device."""
        return ConditionerInput(self.frames.to(device), self.summary.to(device))

    def select(self, rows: list[int] | slice) -> ConditionerInput:
        """Some of the sounds."""
        return ConditionerInput(self.frames[rows], self.summary[rows])


def collate(tokens: list[ConditionerInput]) -> ConditionerInput:
    """One batch of several."""
    return ConditionerInput(torch.cat([item.frames for item in tokens]), torch.cat([item.summary for item in tokens]))


class PCAWhitening(nn.Module):
    """Principal component scores divided by the root of their standard deviation, of unit mean square over all.

    Half-way whitening: the leading axes separate sounds, the trailing ones are noise that full whitening would raise to them.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    def __init__(self, width: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(width, components))
        self.register_buffer("scale", torch.ones(components))

    @torch.no_grad()
    def fit(self, rows: torch.Tensor) -> None:
        """Fit on rows [N, width] in double precision; the sign of each axis is fixed by its largest entry.

        Rows that are all alike, as those of silent sounds, get the scale 1: their scores are 0.
        """
        data = rows.double()
        mean = data.mean(0)
        centred = data - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(data) - 1))
        count = self.basis.shape[1]
        vectors = vectors.flip(1)[:, :count]
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        deviations = values.flip(0)[:count].clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(vectors * signs)
        if deviations[0] <= ALIKE * data.square().mean().sqrt():
            self.scale.fill_(1.0)
            return
        scale = deviations.clamp(min=float(deviations[0]) * 1e-3 + 1e-8).sqrt()
        self.scale.copy_(scale * ((deviations / scale) ** 2).mean().sqrt())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Scores [..., components] of rows [..., width]."""
        scores: torch.Tensor = ((rows - self.mean) @ self.basis) / self.scale
        return scores


class RetrievalMemory(nn.Module):
    """Training sounds in which every sound is expressed: softmax attention with fixed keys and values.

    With a few hundred sounds a network learns their tokens by heart and answers a new sound with anything. The attention brings
    a new sound to the known ones that it resembles, as retrieval-augmented diffusion does (Blattmann et al. 2022, arXiv
    2204.11824); a known sound stays what it is. Loudness is not part of it.
    """

    keys: torch.Tensor
    frames: torch.Tensor
    summaries: torch.Tensor
    filled: torch.Tensor

    def __init__(self, size: int, temperature: float, frames: int, frame_width: int, summary_width: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("keys", torch.zeros(size, summary_width))
        self.register_buffer("frames", torch.zeros(size, frames, frame_width))
        self.register_buffer("summaries", torch.zeros(size, summary_width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def fill(self, frames: torch.Tensor, summaries: torch.Tensor) -> None:
        """Take sounds [N, T, P] and [N, P + S]; of more than there is room for, every N/size-th."""
        size = len(self.keys)
        rows = torch.linspace(0, len(summaries) - 1, min(size, len(summaries)), dtype=torch.float64).round().long()
        self.filled.fill_(len(rows))
        self.frames[: len(rows)] = frames[rows]
        self.summaries[: len(rows)] = summaries[rows]
        self.keys[: len(rows)] = F.normalize(summaries[rows], dim=1)

    def forward(self, frames: torch.Tensor, summaries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same sounds in terms of the known ones; unchanged while nothing is known."""
        known = int(self.filled)
        if not known:
            return frames, summaries
        likeness = F.normalize(summaries, dim=1) @ self.keys[:known].T
        weights = torch.softmax(likeness / self.temperature, 1)
        return torch.einsum("nm,mtp->ntp", weights, self.frames[:known]), weights @ self.summaries[:known]


class AudioConditioner(nn.Module):
    """Sound features -> tokens [N, 1 + frames, width]; the first token stands for the whole sound.

    Args:
        frames: number of time tokens.
        frame_components, tag_components: principal components kept of the frames and of the mean tag logits.
        width: of the tokens, the denoiser's `cross_attention_dim`.
        layers: transformer layers.
        dropout: of inputs and layers.
        memory: most training sounds in which a sound is expressed; 0: it is heard as it is.
        memory_temperature: of the attention to them, in cosines.
    """

    def __init__(
        self,
        frames: int,
        frame_components: int,
        tag_components: int,
        width: int,
        layers: int,
        dropout: float,
        memory: int = 0,
        memory_temperature: float = 0.03,
    ) -> None:
        super().__init__()
        self.settings = {
            "frames": frames,
            "frame_components": frame_components,
            "tag_components": tag_components,
            "width": width,
            "layers": layers,
            "dropout": dropout,
            "memory": memory,
            "memory_temperature": memory_temperature,
        }
        self.frames = frames
        self.memory = RetrievalMemory(memory, memory_temperature, frames, frame_components, frame_components + tag_components)
        self.frame_axes = PCAWhitening(FEATURE_WIDTH, frame_components)
        self.tag_axes = PCAWhitening(TAGS, tag_components)
        self.frame_in = nn.Linear(frame_components, width)
        self.summary_in = nn.Sequential(
            nn.Linear(frame_components + tag_components + 2, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.position = nn.Parameter(torch.randn(1 + frames, width) * 0.02)
        self.silence = nn.Parameter(torch.randn(1 + frames, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def fit(self, sounds: list[AudioFeatures]) -> None:
        """Fit the fixed part on training sounds. No label is read."""
        self.frame_axes.fit(torch.cat([sound.frames for sound in sounds]).float().sqrt())
        self.tag_axes.fit(torch.stack([_tag_summary(sound) for sound in sounds]))

    def remember(self, sounds: list[AudioFeatures]) -> None:
        """Fill the memory with clean training sounds, after `fit`."""
        tokens = [self._plain_tokens(sound) for sound in sounds]
        self.memory.fill(torch.cat([frames for frames, _ in tokens]), torch.cat([summary for _, summary in tokens]))

    @property
    def summary_width(self) -> int:
        """Numbers in a summary: mean frame components, tag components, loudness, peak."""
        return int(self.settings["frame_components"]) + int(self.settings["tag_components"]) + 2

    def encode_on_cpu(self, sound: AudioFeatures) -> ConditionerInput:
        """`tokens` of features that are on the CPU, wherever the weights are."""
        device = self.position.device
        moved = AudioFeatures(sound.frames.to(device), sound.logits.to(device), sound.level.to(device))
        return self.tokens(moved).to("cpu")

    @torch.no_grad()
    def tokens(self, sound: AudioFeatures) -> ConditionerInput:
        """Input of one sound: frames averaged to a fixed number in time; mean frame, tag scores, loudness and peak."""
        frames, summary = self.memory(*self._plain_tokens(sound))
        level = (sound.level.float() - LEVEL_CENTRE_DB) / LEVEL_SCALE_DB
        return ConditionerInput(frames, torch.cat([summary, level[None]], 1))

    @torch.no_grad()
    def _plain_tokens(self, sound: AudioFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.frame_axes(sound.frames.float().sqrt())
        frames = F.adaptive_avg_pool1d(scores.T[None], self.frames).transpose(1, 2)
        return frames, torch.cat([scores.mean(0), self.tag_axes(_tag_summary(sound))])[None]

    def forward(self, tokens: ConditionerInput, heard: torch.Tensor) -> torch.Tensor:
        """Tokens [N, 1 + frames, width]; where `heard` [N] is false, the learned tokens of "no sound given"."""
        summary = self.summary_in(self.dropout(tokens.summary))[:, None]
        hidden = torch.cat([summary, self.frame_in(self.dropout(tokens.frames))], 1) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = torch.where(heard[:, None, None], hidden, self.silence.expand_as(hidden))
        result: torch.Tensor = self.norm(hidden)
        return result


def _tag_summary(sound: AudioFeatures) -> torch.Tensor:
    """Mean over time of the tag logits, [521]: log-odds that each kind of sound is heard."""
    return sound.logits.float().mean(0)
