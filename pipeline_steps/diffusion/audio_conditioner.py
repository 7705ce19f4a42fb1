"""Audio conditioner of recipe `scratch`: audio features -> tokens for cross-attention.

A fixed part, fitted on training clips without labels, reduces 1024-d frames and 521 tag logits to a few principal components
of similar scale. With a few hundred clips, a learned projection of the raw features would overfit. A small transformer then
mixes one summary token (tags and loudness) and the time tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pipeline_steps.diffusion.audio_features import FEATURE_WIDTH, TAGS, AudioFeatures
from pipeline_steps.diffusion.tensor_batch import TensorBatch

LEVEL_CENTER_DB = -25.0
LEVEL_SCALE_DB = 12.0
MIN_RELATIVE_DEVIATION = 1e-5
"""Standard deviation of rows, relative to their root mean square, that is not more than rounding."""


@dataclass(frozen=True, slots=True)
class ConditionerInput(TensorBatch):
    """Input of the conditioner for N clips: frames [N, T, P] and summary [N, P + S + 2]."""

    frames: torch.Tensor
    summary: torch.Tensor


def collate(inputs: list[ConditionerInput]) -> ConditionerInput:
    """Concatenate inputs into one batch."""
    return ConditionerInput(torch.cat([item.frames for item in inputs]), torch.cat([item.summary for item in inputs]))


class PCAWhitening(nn.Module):
    """Principal component scores, divided by the root of their standard deviation and scaled to unit mean square.

    The whitening is partial: the leading components separate clips, the trailing ones are noise that full whitening would
    amplify to the same level.
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

        Identical rows, such as those of silent clips, get the scale 1: their scores are 0.
        """
        data = rows.double()
        mean = data.mean(0)
        centered = data - mean
        values, vectors = torch.linalg.eigh(centered.T @ centered / max(1, len(data) - 1))
        count = self.basis.shape[1]
        vectors = vectors.flip(1)[:, :count]
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        deviations = values.flip(0)[:count].clamp(min=0).sqrt()
        self.mean.copy_(mean)
        self.basis.copy_(vectors * signs)
        if deviations[0] <= MIN_RELATIVE_DEVIATION * data.square().mean().sqrt():
            self.scale.fill_(1.0)
            return
        scale = deviations.clamp(min=float(deviations[0]) * 1e-3 + 1e-8).sqrt()
        self.scale.copy_(scale * ((deviations / scale) ** 2).mean().sqrt())

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Scores [..., components] of rows [..., width]."""
        scores: torch.Tensor = ((rows - self.mean) @ self.basis) / self.scale
        return scores


class RetrievalMemory(nn.Module):
    """Softmax attention over stored training clips, with fixed keys and values.

    With a few hundred clips a network memorizes their tokens and generalizes badly to new ones. The attention maps a new clip
    to similar training clips, as in retrieval-augmented diffusion (Blattmann et al. 2022, arXiv 2204.11824). A stored clip
    maps to itself. Loudness is not part of it.
    """

    keys: torch.Tensor
    frames: torch.Tensor
    summaries: torch.Tensor
    filled: torch.Tensor

    def __init__(self, size: int, temperature: float, num_tokens: int, frame_width: int, summary_width: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("keys", torch.zeros(size, summary_width))
        self.register_buffer("frames", torch.zeros(size, num_tokens, frame_width))
        self.register_buffer("summaries", torch.zeros(size, summary_width))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def fill(self, frames: torch.Tensor, summaries: torch.Tensor) -> None:
        """Store clips [N, T, P] and [N, P + S]; if N exceeds the size, evenly spaced ones."""
        size = len(self.keys)
        rows = torch.linspace(0, len(summaries) - 1, min(size, len(summaries)), dtype=torch.float64).round().long()
        self.filled.fill_(len(rows))
        self.frames[: len(rows)] = frames[rows]
        self.summaries[: len(rows)] = summaries[rows]
        self.keys[: len(rows)] = F.normalize(summaries[rows], dim=1)

    def forward(self, frames: torch.Tensor, summaries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention-weighted averages of stored clips; the input itself while nothing is stored."""
        stored = int(self.filled)
        if not stored:
            return frames, summaries
        similarity = F.normalize(summaries, dim=1) @ self.keys[:stored].T
        weights = torch.softmax(similarity / self.temperature, 1)
        return torch.einsum("nm,mtp->ntp", weights, self.frames[:stored]), weights @ self.summaries[:stored]


class AudioConditioner(nn.Module):
    """Audio features -> tokens [N, 1 + num_time_tokens, hidden_dim]; the first token summarizes the clip.

    Args:
        num_time_tokens: tokens over time.
        frame_pca_dim, tag_pca_dim: principal components kept of the frames and of the mean tag logits.
        hidden_dim: width of the tokens, the denoiser's `cross_attention_dim`.
        num_layers: transformer layers.
        dropout: of inputs and layers.
        retrieval_memory_size: training clips kept for retrieval; 0 disables it.
        retrieval_temperature: of the attention to them, in cosines.
    """

    def __init__(
        self,
        num_time_tokens: int,
        frame_pca_dim: int,
        tag_pca_dim: int,
        hidden_dim: int,
        num_layers: int,
        dropout: float,
        retrieval_memory_size: int = 0,
        retrieval_temperature: float = 0.03,
    ) -> None:
        super().__init__()
        self.settings = {
            "num_time_tokens": num_time_tokens,
            "frame_pca_dim": frame_pca_dim,
            "tag_pca_dim": tag_pca_dim,
            "hidden_dim": hidden_dim,
            "num_layers": num_layers,
            "dropout": dropout,
            "retrieval_memory_size": retrieval_memory_size,
            "retrieval_temperature": retrieval_temperature,
        }
        self.num_time_tokens = num_time_tokens
        pca_dim = frame_pca_dim + tag_pca_dim
        self.memory = RetrievalMemory(retrieval_memory_size, retrieval_temperature, num_time_tokens, frame_pca_dim, pca_dim)
        self.frame_axes = PCAWhitening(FEATURE_WIDTH, frame_pca_dim)
        self.tag_axes = PCAWhitening(TAGS, tag_pca_dim)
        self.frame_in = nn.Linear(frame_pca_dim, hidden_dim)
        self.summary_in = nn.Sequential(nn.Linear(pca_dim + 2, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        self.position = nn.Parameter(torch.randn(1 + num_time_tokens, hidden_dim) * 0.02)
        self.silence = nn.Parameter(torch.randn(1 + num_time_tokens, hidden_dim) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden_dim, 4, 2 * hidden_dim, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)

    def fit(self, clips: list[AudioFeatures]) -> None:
        """Fit the fixed part on training clips. Labels are not used."""
        self.frame_axes.fit(torch.cat([clip.frames for clip in clips]).float().sqrt())
        self.tag_axes.fit(torch.stack([_mean_tag_logits(clip) for clip in clips]))

    def fill_memory(self, clips: list[AudioFeatures]) -> None:
        """Store unaugmented training clips for retrieval; call it after `fit`."""
        inputs = [self._encode_without_memory(clip) for clip in clips]
        self.memory.fill(torch.cat([frames for frames, _ in inputs]), torch.cat([summary for _, summary in inputs]))

    @property
    def summary_width(self) -> int:
        """Width of a summary: mean frame components, tag components, loudness, peak."""
        return int(self.settings["frame_pca_dim"]) + int(self.settings["tag_pca_dim"]) + 2

    def encode_on_cpu(self, clip: AudioFeatures) -> ConditionerInput:
        """`encode` for features on the CPU, with the weights on any device."""
        device = self.position.device
        moved = AudioFeatures(clip.frames.to(device), clip.logits.to(device), clip.level.to(device))
        return self.encode(moved).to("cpu")

    @torch.no_grad()
    def encode(self, clip: AudioFeatures) -> ConditionerInput:
        """Input of one clip: frames pooled to a fixed number; mean frame, tag scores, loudness and peak."""
        frames, summary = self.memory(*self._encode_without_memory(clip))
        level = (clip.level.float() - LEVEL_CENTER_DB) / LEVEL_SCALE_DB
        return ConditionerInput(frames, torch.cat([summary, level[None]], 1))

    @torch.no_grad()
    def _encode_without_memory(self, clip: AudioFeatures) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.frame_axes(clip.frames.float().sqrt())
        frames = F.adaptive_avg_pool1d(scores.T[None], self.num_time_tokens).transpose(1, 2)
        return frames, torch.cat([scores.mean(0), self.tag_axes(_mean_tag_logits(clip))])[None]

    def forward(self, inputs: ConditionerInput, condition_mask: torch.Tensor) -> torch.Tensor:
        """Tokens [N, 1 + num_time_tokens, hidden_dim]; the learned null tokens where `condition_mask` [N] is false."""
        summary = self.summary_in(self.dropout(inputs.summary))[:, None]
        hidden = torch.cat([summary, self.frame_in(self.dropout(inputs.frames))], 1) + self.position
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = torch.where(condition_mask[:, None, None], hidden, self.silence.expand_as(hidden))
        result: torch.Tensor = self.norm(hidden)
        return result


def _mean_tag_logits(clip: AudioFeatures) -> torch.Tensor:
    """Mean over time of the tag logits, [521]."""
    return clip.logits.float().mean(0)
