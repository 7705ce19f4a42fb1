"""Many tokens of a sound -> a few for cross-attention, by learned queries (Perceiver, Jaegle et al. 2021, arXiv 2103.03206; the
resampler of Flamingo, Alayrac et al. 2022, arXiv 2204.14198)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import IPAdapterFullImageProjection
from torch import nn


def sinusoidal_time_encoding(moments: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Sine and cosine codes [moments, width] of time, for sounds of any length (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(moments, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


def pad_audio_tokens(grids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of token grids [moments, bands, width] of different lengths.

    Returns:
        grids [N, longest, bands, width] filled up with zeros, and which moments [N, longest] are the sound's own.
    """
    longest = max(len(grid) for grid in grids)
    present = torch.arange(longest) < torch.tensor([len(grid) for grid in grids])[:, None]
    return torch.stack([F.pad(grid, (0, 0, 0, 0, 0, longest - len(grid))) for grid in grids]), present


class _PerceiverBlock(nn.Module):
    """Queries look at the sound and at each other, then go through an MLP; each step adds to what was there."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_queries, self.norm_sound, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: torch.Tensor, sound: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        normed = self.norm_queries(queries)
        seen = torch.cat([self.norm_sound(sound), normed], 1)
        key, value = self.key_value(seen).chunk(2, -1)
        mask = F.pad(present, (0, queries.shape[1]), value=True)[:, None, None]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(normed), key, value))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        queries = queries + self.out(attended.transpose(1, 2).flatten(2))
        mixed: torch.Tensor = queries + self.mlp(self.norm_mlp(queries))
        return mixed


class PerceiverResampler(nn.Module):
    """Token grids of sounds [N, moments, bands, width_in] -> tokens [N, count, width].

    Two stages: learned queries gather what the sound says into embeddings [N, count, inner] (`summarise`), and a small
    network for each of them makes the tokens (`image_proj`). The second is a stock diffusers module with the name that
    IP-Adapter files give it, so that stock pipelines can take over from the embeddings.

    Args:
        width_in: numbers in a token of the encoder (AST: 768).
        bands: tokens of one moment (AST: 12); each has a learned code, each moment a fixed one.
        count: tokens that come out.
        width: of those, the denoiser's `cross_attention_dim`.
        inner: width inside.
        depth: blocks.
        heads: attention heads; divides `inner`.
        dropout: of attention weights while training.
    """

    def __init__(
        self,
        width_in: int,
        bands: int,
        count: int = 32,
        width: int = 768,
        inner: int = 512,
        depth: int = 4,
        heads: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if inner % heads or inner % 2:
            raise ValueError(f"inner width {inner} is not an even multiple of {heads} heads")
        self.settings = {
            "width_in": width_in, "bands": bands, "count": count, "width": width, "inner": inner, "depth": depth,
            "heads": heads, "dropout": dropout,
        }  # fmt: skip
        self.project = nn.Linear(width_in, inner)
        self.band_codes = nn.Parameter(torch.randn(bands, inner) * 0.02)
        self.queries = nn.Parameter(torch.randn(count, inner) * inner**-0.5)
        self.blocks = nn.ModuleList(_PerceiverBlock(inner, heads, dropout) for _ in range(depth))
        self.silence = nn.Parameter(torch.randn(count, inner) * inner**-0.5)
        self.image_proj = IPAdapterFullImageProjection(inner, width)

    def resample(self, grids: torch.Tensor, present: torch.Tensor, heard: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings [N, count, inner]; see `forward` for the arguments."""
        codes = sinusoidal_time_encoding(grids.shape[1], self.queries.shape[1], grids.device).to(self.band_codes.dtype)
        sound = self.project(grids) + codes[:, None] + self.band_codes
        mask = present[:, :, None].expand(grids.shape[:3]).flatten(1)
        queries = self.queries.expand(len(grids), -1, -1)
        for block in self.blocks:
            queries = block(queries, sound.flatten(1, 2), mask)
        return queries if heard is None else torch.where(heard[:, None, None], queries, self.silence.to(queries.dtype))

    def forward(self, grids: torch.Tensor, present: torch.Tensor, heard: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [N, count, width].

        Args:
            grids: [N, moments, bands, width_in].
            present: [N, moments], false where a grid was only filled up; what stands there changes nothing.
            heard: [N]; where false, the learned tokens of "no sound given" (for guidance) come out.
        """
        tokens: torch.Tensor = self.image_proj(self.resample(grids, present, heard))
        return tokens
