"""The part of the denoiser that sees the whole picture at once: a residual MLP over all latents, told the sound and the time.

A convolution uses each weight at every position and so pays for it at every position; a fully connected layer uses it once. On
a few hundred centred pictures, composition - what is where, and in which colours - is learned by the MLP at a tenth of the cost
that the U-Net needs for it. The U-Net then only adds what is local.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

TIME_FEATURES = 64


class FiLMBlock(nn.Module):
    """x + W2 silu(W1 (norm(x) (1 + g) + b)), gain g and bias b from the condition (as in FiLM; zero at first)."""

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
    """Correction of latents [N, C, h, w] in unit size, from the latents seen, the time and the sound's summary; zero at first.

    Args:
        channels, size: of the latents.
        inputs: width of the sound summaries.
        width, blocks: of the MLP.
        dropout: of the summaries.
    """

    def __init__(self, channels: int, size: int, inputs: int, width: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.settings = {
            "channels": channels,
            "size": size,
            "inputs": inputs,
            "width": width,
            "blocks": blocks,
            "dropout": dropout,
        }
        condition = max(16, width // 4)
        latents = channels * size * size
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.sound = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(inputs, condition), nn.SiLU(), nn.Linear(condition, condition)
        )
        self.silence = nn.Parameter(torch.zeros(condition))
        self.enter = nn.Linear(latents, width)
        self.blocks = nn.ModuleList(FiLMBlock(width, condition) for _ in range(blocks))
        self.leave = nn.Linear(width, latents)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def encode_audio(self, summaries: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        """Condition [N, D] of sound summaries [N, S]; the learned "no sound given" where `heard` [N] is false."""
        sound = self.sound(summaries)
        return torch.where(heard[:, None], sound, self.silence.expand_as(sound))

    def forward(self, seen: torch.Tensor, times: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        """Correction [N, C, h, w] at seen latents [N, C, h, w], times [N] and conditions [N, D]."""
        condition = F.silu(self.time(timestep_embedding(times)) + sound)
        hidden = self.enter(seen.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, condition)
        correction: torch.Tensor = self.leave(hidden)
        return correction.view_as(seen)


def timestep_embedding(times: torch.Tensor) -> torch.Tensor:
    """Sines and cosines [N, 64] of times [N] at 32 frequencies from 1/2 to 200 periods per unit of time."""
    frequencies = torch.exp(torch.linspace(0.0, 6.0, TIME_FEATURES // 2, device=times.device))
    angles = times[:, None] * frequencies * math.pi
    return torch.cat([angles.sin(), angles.cos()], 1)
