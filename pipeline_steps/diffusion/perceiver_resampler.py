"""Perceiver resampler: many audio tokens -> a few for cross-attention, by learned queries.

Sources: Jaegle et al. 2021, arXiv 2103.03206; Alayrac et al. 2022, arXiv 2204.14198.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import IPAdapterFullImageProjection
from torch import nn


def sinusoidal_time_encoding(length: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Sinusoidal position encoding [length, width] of time (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


def pad_audio_tokens(grids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token grids [time, bands, width] of different lengths to one batch.

    Returns:
        grids [N, longest, bands, width], padded with zeros; mask [N, longest], false for padding.
    """
    longest = max(len(grid) for grid in grids)
    mask = torch.arange(longest) < torch.tensor([len(grid) for grid in grids])[:, None]
    return torch.stack([F.pad(grid, (0, 0, 0, 0, 0, longest - len(grid))) for grid in grids]), mask


class _PerceiverBlock(nn.Module):
    """Attention of queries to audio tokens and to each other, then an MLP; both residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_queries, self.norm_sound, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries: torch.Tensor, audio: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        normed = self.norm_queries(queries)
        context = torch.cat([self.norm_sound(audio), normed], 1)
        key, value = self.key_value(context).chunk(2, -1)
        mask = F.pad(present, (0, queries.shape[1]), value=True)[:, None, None]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query(normed), key, value))
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        queries = queries + self.out(attended.transpose(1, 2).flatten(2))
        mixed: torch.Tensor = queries + self.mlp(self.norm_mlp(queries))
        return mixed


class PerceiverResampler(nn.Module):
    """Token grids of clips [N, time, bands, input_width] -> tokens [N, num_queries, output_width].

    Two stages: learned queries attend to the audio, which gives embeddings [N, num_queries, dim] (`resample`); a small network
    maps each embedding to a token (`image_proj`). The second stage is a diffusers module with its name in IP-Adapter files, so
    that stock pipelines can start from the embeddings.

    Args:
        input_width: width of an encoder token (AST: 768).
        bands: encoder tokens per time step (AST: 12), each with a learned position code.
        num_queries: output tokens.
        output_width: width of the output tokens, the denoiser's `cross_attention_dim`.
        dim: width of the embeddings.
        depth: blocks.
        heads: attention heads; divides `dim`.
        dropout: of attention weights during training.
    """

    def __init__(
        self,
        input_width: int,
        bands: int,
        num_queries: int = 32,
        output_width: int = 768,
        dim: int = 512,
        depth: int = 4,
        heads: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads or dim % 2:
            raise ValueError(f"dim {dim} is not an even multiple of {heads} heads")
        self.settings = {
            "input_width": input_width, "bands": bands, "num_queries": num_queries, "output_width": output_width, "dim": dim,
            "depth": depth, "heads": heads, "dropout": dropout,
        }  # fmt: skip
        self.project = nn.Linear(input_width, dim)
        self.band_codes = nn.Parameter(torch.randn(bands, dim) * 0.02)
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * dim**-0.5)
        self.blocks = nn.ModuleList(_PerceiverBlock(dim, heads, dropout) for _ in range(depth))
        self.silence = nn.Parameter(torch.randn(num_queries, dim) * dim**-0.5)
        self.image_proj = IPAdapterFullImageProjection(dim, output_width)

    def resample(self, grids: torch.Tensor, mask: torch.Tensor, condition_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings [N, num_queries, dim]; the arguments are those of `forward`."""
        codes = sinusoidal_time_encoding(grids.shape[1], self.queries.shape[1], grids.device).to(self.band_codes.dtype)
        audio = self.project(grids) + codes[:, None] + self.band_codes
        present = mask[:, :, None].expand(grids.shape[:3]).flatten(1)
        queries = self.queries.expand(len(grids), -1, -1)
        for block in self.blocks:
            queries = block(queries, audio.flatten(1, 2), present)
        if condition_mask is None:
            return queries
        return torch.where(condition_mask[:, None, None], queries, self.silence.to(queries.dtype))

    def forward(self, grids: torch.Tensor, mask: torch.Tensor, condition_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [N, num_queries, output_width].

        Args:
            grids: [N, time, bands, input_width].
            mask: [N, time], false for padding, which does not change the result.
            condition_mask: [N]; the learned null embeddings, which guidance needs, are used where it is false.
        """
        tokens: torch.Tensor = self.image_proj(self.resample(grids, mask, condition_mask))
        return tokens
