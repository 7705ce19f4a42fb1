"""MLP denoiser: a residual MLP over all latents, conditioned on audio and time.

A convolution applies each weight at every position and pays for it at every position; a fully connected layer applies it once.
On a few hundred centered images, the MLP learns the composition at a fraction of the cost of the U-Net, which then adds local
detail.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

TIME_FEATURES = 64


class FiLMBlock(nn.Module):
    """x + W2 silu(W1 (norm(x) (1 + g) + b)), gain g and bias b from the condition (FiLM); zero update at initialization."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(condition, 2 * width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        gain, bias = self.modulation(condition).chunk(2, 1)
        update: torch.Tensor = self.second(F.silu(self.first(self.norm(hidden) * (1 + gain) + bias)))
        return hidden + update


class MLPDenoiser(nn.Module):
    """Correction of latents [N, C, h, w] at unit scale, from noisy latents, time and audio summary; zero at initialization.

    Args:
        channels, size: of the latents.
        summary_width: width of the audio summaries.
        hidden_dim, num_blocks: of the MLP.
        dropout: of the summaries.
    """

    def __init__(self, channels: int, size: int, summary_width: int, hidden_dim: int, num_blocks: int, dropout: float) -> None:
        super().__init__()
        self.settings = {
            "channels": channels,
            "size": size,
            "summary_width": summary_width,
            "hidden_dim": hidden_dim,
            "num_blocks": num_blocks,
            "dropout": dropout,
        }
        condition = max(16, hidden_dim // 4)
        latents = channels * size * size
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.sound = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(summary_width, condition), nn.SiLU(), nn.Linear(condition, condition)
        )
        self.silence = nn.Parameter(torch.zeros(condition))
        self.enter = nn.Linear(latents, hidden_dim)
        self.blocks = nn.ModuleList(FiLMBlock(hidden_dim, condition) for _ in range(num_blocks))
        self.leave = nn.Linear(hidden_dim, latents)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def embed_audio(self, summaries: torch.Tensor, condition_mask: torch.Tensor) -> torch.Tensor:
        """Condition [N, D] of audio summaries [N, S]; the learned null condition where `condition_mask` [N] is false."""
        audio = self.sound(summaries)
        return torch.where(condition_mask[:, None], audio, self.silence.expand_as(audio))

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """Correction [N, C, h, w] for scaled noisy latents [N, C, h, w], times [N] and audio conditions [N, D]."""
        condition = F.silu(self.time(timestep_embedding(times)) + audio)
        hidden = self.enter(noisy.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        correction: torch.Tensor = self.leave(hidden)
        return correction.view_as(noisy)


def timestep_embedding(times: torch.Tensor) -> torch.Tensor:
    """Sines and cosines [N, 64] of times [N] at 32 frequencies from 1/2 to 200 periods per unit of time."""
    frequencies = torch.exp(torch.linspace(0.0, 6.0, TIME_FEATURES // 2, device=times.device))
    angles = times[:, None] * frequencies * math.pi
    return torch.cat([angles.sin(), angles.cos()], 1)
