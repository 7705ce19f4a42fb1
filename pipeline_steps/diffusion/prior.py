"""The best linear guess: what the pictures' mean and covariance, and a linear map from sounds, say about noisy latents.

At high noise a denoiser does little more than this (Wang & Vastola 2024, arXiv 2412.09726), and it has a closed form. The U-Net
starts from it and learns what is left, so no training step is spent on finding out that borders are white, that colours agree,
or what the pictures of like sounds have in common. The coarse channels (first principal components of the patches) share one
full covariance over all positions; the finer ones are taken as independent.
"""

from __future__ import annotations

import torch
from torch import nn

MIN_TIME = 1e-3
"""Velocities divide by time; no sampler asks for less."""
SHRINKAGE = 0.1
"""Share of the off-diagonal covariance that is given up, since there are few pictures."""
PENALTIES = tuple(10.0**power for power in range(-2, 6))
"""Ridge penalties tried, relative to the mean eigenvalue of the inputs."""
FOLDS = 5


class GaussianPrior(nn.Module):
    """Normal distribution of latents [C, h, w]: full covariance over the first `coarse` channels, diagonal over the rest.

    Args:
        channels, size: of the latents.
        coarse: number of coarse channels.
        inputs: width of the sound summaries that move the mean of the coarse channels.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    basis: torch.Tensor
    spectrum: torch.Tensor
    input_mean: torch.Tensor
    slope: torch.Tensor

    def __init__(self, channels: int, size: int, coarse: int, inputs: int) -> None:
        super().__init__()
        self.settings = {"channels": channels, "size": size, "coarse": coarse, "inputs": inputs}
        self.coarse = coarse
        rank = coarse * size * size
        self.register_buffer("mean", torch.zeros(channels, size, size))
        self.register_buffer("variance", torch.ones(channels, size, size))
        self.register_buffer("basis", torch.eye(rank))
        self.register_buffer("spectrum", torch.ones(rank))
        self.register_buffer("input_mean", torch.zeros(inputs))
        self.register_buffer("slope", torch.zeros(inputs, rank))

    @torch.no_grad()
    def fit(self, latents: torch.Tensor, summaries: torch.Tensor, groups: torch.Tensor) -> float:
        """Fit on latents [N, C, h, w] of varied training pictures and the summaries [N, S] of their sounds.

        The ridge penalty is chosen by cross-validation that keeps the rows of one sound (`groups` [N]) together, and the
        covariance is that of the errors made on sounds left out: unseen sounds are what the model is for.

        Returns:
            Share of the coarse variance that the sounds left out explain.
        """
        rows, inputs = latents.double(), summaries.double()
        mean, input_mean = rows.mean(0), inputs.mean(0)
        centred, heard = rows - mean, inputs - input_mean
        coarse = centred[:, : self.coarse].flatten(1)
        unit = float(heard.square().sum(1).mean()) / heard.shape[1]
        total = float(coarse.square().mean())
        left_out = torch.zeros_like(coarse)
        best, penalty = total, 0.0
        for candidate in PENALTIES:
            predicted = torch.zeros_like(coarse)
            for fold in range(FOLDS):
                out = groups % FOLDS == fold
                if bool(out.any()) and not bool(out.all()):
                    predicted[out] = heard[out] @ ridge(heard[~out], coarse[~out], candidate * unit)
            error = float((coarse - predicted).square().mean())
            if error < best:
                best, penalty, left_out = error, candidate, predicted
        if penalty:
            self.slope.copy_(ridge(heard, coarse, penalty * unit))
        self.mean.copy_(mean)
        self.input_mean.copy_(input_mean)
        rest = coarse - left_out
        variance = centred.square().mean(0)
        variance[: self.coarse] = rest.square().mean(0).view(self.coarse, *variance.shape[1:])
        self.variance.copy_(variance + 1e-6)
        covariance = rest.T @ rest / len(rest)
        diagonal = torch.diag(covariance.diagonal())
        values, vectors = torch.linalg.eigh((1 - SHRINKAGE) * covariance + SHRINKAGE * diagonal)
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        self.basis.copy_(vectors * signs)
        self.spectrum.copy_(values.clamp(min=1e-6))
        return 1.0 - best / total

    def expect(self, summaries: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
        """Mean latents [N, C, h, w] given sound summaries [N, S]; where `heard` [N] is false, the mean over all sounds."""
        moved = (summaries - self.input_mean) @ self.slope * heard[:, None]
        shift = moved.view(len(moved), self.coarse, *self.mean.shape[1:])
        return torch.cat([self.mean[: self.coarse] + shift, self.mean[self.coarse :].expand(len(moved), -1, -1, -1)], 1)

    def denoise(self, noisy: torch.Tensor, times: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """E[z | z_t] for z_t = (1 - t) z + t e and a prior mean [N, C, h, w]: mean + gain (z_t - (1 - t) mean)."""
        keep = (1 - times)[:, None, None, None]
        noise = times.clamp(min=MIN_TIME)[:, None, None, None]
        centred = noisy - keep * mean
        estimate = keep * self.variance / (keep**2 * self.variance + noise**2) * centred
        rows = centred[:, : self.coarse].flatten(1) @ self.basis
        keep, noise = keep[:, :, 0, 0], noise[:, :, 0, 0]
        rows = keep * self.spectrum / (keep**2 * self.spectrum + noise**2) * rows
        coarse = (rows @ self.basis.T).view(len(noisy), self.coarse, *noisy.shape[2:])
        return torch.cat([coarse, estimate[:, self.coarse :]], 1) + mean

    def scales(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors [N, C, h, w] that bring z_t - (1 - t) mean to unit deviation, and a unit correction to that of z given z_t.

        Both as in Karras et al. 2022 (arXiv 2206.00364, table 1: c_in, c_out), by channel and position.
        """
        keep = (1 - times)[:, None, None, None]
        noise = times.clamp(min=MIN_TIME)[:, None, None, None]
        total = (keep**2 * self.variance + noise**2).rsqrt()
        return total, noise * self.variance.sqrt() * total


def ridge(inputs: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """Slope [S, D] of the penalised least squares of targets [N, D] on inputs [N, S]; penalty per row."""
    gram = inputs.T @ inputs / len(inputs) + penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    return torch.linalg.solve(gram, inputs.T @ targets / len(inputs))
