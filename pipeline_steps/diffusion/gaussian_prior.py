"""The best linear guess: what the pictures' mean and covariance alone say about noisy latents.

At high noise a denoiser does little more than this (Wang & Vastola 2024, arXiv 2412.09726), and it has a closed form. What is
learned starts from it, so no step is spent on finding out that borders are white and that colours agree. The coarse channels
(first principal components of the patches) share one full covariance over all positions; the finer ones count as independent.
"""

from __future__ import annotations

import torch
from torch import nn

MIN_TIME = 1e-3
"""Velocities divide by time; no sampler asks for less."""
SHRINKAGE = 0.1
"""Share of the off-diagonal covariance that is given up, since there are few pictures."""


class GaussianDenoiser(nn.Module):
    """Normal distribution of latents [C, h, w], full over the first `coarse` channels, diagonal over the rest."""

    mean: torch.Tensor
    variance: torch.Tensor
    basis: torch.Tensor
    spectrum: torch.Tensor

    def __init__(self, channels: int, size: int, coarse: int) -> None:
        super().__init__()
        self.settings = {"channels": channels, "size": size, "coarse": coarse}
        self.coarse = coarse
        rank = coarse * size * size
        self.register_buffer("mean", torch.zeros(channels, size, size))
        self.register_buffer("variance", torch.ones(channels, size, size))
        self.register_buffer("basis", torch.eye(rank))
        self.register_buffer("spectrum", torch.ones(rank))

    @torch.no_grad()
    def fit(self, latents: torch.Tensor) -> None:
        """Fit on latents [N, C, h, w] of varied training pictures."""
        rows = latents.double()
        centred = rows - rows.mean(0)
        self.mean.copy_(rows.mean(0))
        self.variance.copy_(centred.square().mean(0) + 1e-6)
        coarse = centred[:, : self.coarse].flatten(1)
        covariance = coarse.T @ coarse / len(coarse)
        diagonal = torch.diag(covariance.diagonal())
        values, vectors = torch.linalg.eigh((1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal)
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        self.basis.copy_(vectors * signs)
        self.spectrum.copy_(values.clamp(min=1e-6))

    def denoise(self, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """E[z | z_t] under the prior, for z_t = (1 - t) z + t e: mean + gain (z_t - (1 - t) mean)."""
        keep = (1 - times)[:, None, None, None]
        noise = times.clamp(min=MIN_TIME)[:, None, None, None]
        centred = noisy - keep * self.mean
        estimate = keep * self.variance / (keep**2 * self.variance + noise**2) * centred
        rows = centred[:, : self.coarse].flatten(1) @ self.basis
        keep, noise = keep[:, :, 0, 0], noise[:, :, 0, 0]
        rows = keep * self.spectrum / (keep**2 * self.spectrum + noise**2) * rows
        coarse = (rows @ self.basis.T).view(len(noisy), self.coarse, *noisy.shape[2:])
        return torch.cat([coarse, estimate[:, self.coarse :]], 1) + self.mean

    def scales(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors [N, C, h, w] that bring z_t - (1 - t) mean to unit deviation, and a unit correction to that of z given z_t.

        Both as in Karras et al. 2022 (arXiv 2206.00364, table 1: c_in, c_out), by channel and position.
        """
        keep = (1 - times)[:, None, None, None]
        noise = times.clamp(min=MIN_TIME)[:, None, None, None]
        total: torch.Tensor = (keep**2 * self.variance + noise**2).rsqrt()
        return total, noise * self.variance.sqrt() * total
