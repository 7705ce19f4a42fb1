"""Closed-form denoiser of latents under a normal distribution fitted to the training images.

At high noise a trained denoiser does little more than this (Wang & Vastola 2024, arXiv 2412.09726). The networks learn the
residual, so that no training step is spent on the mean and covariance. The first channels, which are the leading principal
components of the patches, share one full covariance over all positions; the other channels are treated as independent.
"""

from __future__ import annotations

import torch
from torch import nn

MIN_TIME = 1e-3
"""Lower bound of the time, because velocities divide by it."""
SHRINKAGE = 0.1
"""Shrinkage of the off-diagonal covariance, which few images determine badly."""


class GaussianDenoiser(nn.Module):
    """Optimal denoiser of normally distributed latents [C, h, w].

    The covariance is full over the first `full_covariance_channels` channels and diagonal over the rest.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    basis: torch.Tensor
    spectrum: torch.Tensor

    def __init__(self, channels: int, size: int, full_covariance_channels: int) -> None:
        super().__init__()
        self.settings = {"channels": channels, "size": size, "full_covariance_channels": full_covariance_channels}
        self.full_channels = full_covariance_channels
        rank = full_covariance_channels * size * size
        self.register_buffer("mean", torch.zeros(channels, size, size))
        self.register_buffer("variance", torch.ones(channels, size, size))
        self.register_buffer("basis", torch.eye(rank))
        self.register_buffer("spectrum", torch.ones(rank))

    @torch.no_grad()
    def fit(self, latents: torch.Tensor) -> None:
        """Fit on latents [N, C, h, w] of augmented training images."""
        rows = latents.double()
        centered = rows - rows.mean(0)
        self.mean.copy_(rows.mean(0))
        self.variance.copy_(centered.square().mean(0) + 1e-6)
        coarse = centered[:, : self.full_channels].flatten(1)
        covariance = coarse.T @ coarse / len(coarse)
        diagonal = torch.diag(covariance.diagonal())
        values, vectors = torch.linalg.eigh((1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal)
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        self.basis.copy_(vectors * signs)
        self.spectrum.copy_(values.clamp(min=1e-6))

    def denoise(self, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """E[z | z_t] for z_t = (1 - t) z + t e: mean + gain (z_t - (1 - t) mean)."""
        keep = (1 - times)[:, None, None, None]
        noise = times.clamp(min=MIN_TIME)[:, None, None, None]
        centered = noisy - keep * self.mean
        estimate = keep * self.variance / (keep**2 * self.variance + noise**2) * centered
        rows = centered[:, : self.full_channels].flatten(1) @ self.basis
        keep, noise = keep[:, :, 0, 0], noise[:, :, 0, 0]
        rows = keep * self.spectrum / (keep**2 * self.spectrum + noise**2) * rows
        coarse = (rows @ self.basis.T).view(len(noisy), self.full_channels, *noisy.shape[2:])
        return torch.cat([coarse, estimate[:, self.full_channels :]], 1) + self.mean

    def preconditioning(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and output scales c_in, c_out [N, C, h, w] per channel and position (Karras et al. 2022, arXiv 2206.00364).

        c_in scales z_t - (1 - t) mean to unit deviation; c_out is the standard deviation of z given z_t.
        """
        keep = (1 - times)[:, None, None, None]
        noise = times.clamp(min=MIN_TIME)[:, None, None, None]
        total: torch.Tensor = (keep**2 * self.variance + noise**2).rsqrt()
        return total, noise * self.variance.sqrt() * total
