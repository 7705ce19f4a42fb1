"""Rectified flow: interpolation between latents and noise, its velocity, training times, guidance, loss by time.

Time is 0 at the image and 1 at pure noise, like the sigma of diffusers' `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import torch


def interpolate(latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """z_t = (1 - t) z + t e (Liu et al. 2022, arXiv 2209.03003). latents, noise [N, C, h, w]; times [N] in 0..1."""
    t = times[:, None, None, None]
    return (1 - t) * latents + t * noise


def velocity_target(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """dz_t / dt = e - z, the target of velocity prediction."""
    return noise - latents


def logit_normal_times(count: int, mean: float, std: float, generator: torch.Generator) -> torch.Tensor:
    """Training times [count] whose logit is normally distributed (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(torch.randn(count, generator=generator) * std + mean)


def classifier_free_guidance(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Classifier-free guidance u + g (c - u) (Ho & Salimans 2022, arXiv 2207.12598); g = 1 is the conditional model."""
    return unconditional + guidance_scale * (conditional - unconditional)


def bucket_means(losses: torch.Tensor, times: torch.Tensor, buckets: int) -> torch.Tensor:
    """Mean loss [buckets] in equal intervals of time; NaN for an empty interval. losses, times [N]."""
    index = (times * buckets).long().clamp(max=buckets - 1)
    sums = torch.zeros(buckets).index_add_(0, index, losses.detach().float().cpu())
    return sums / torch.bincount(index, minlength=buckets)


def bucket_sums(losses: torch.Tensor, times: torch.Tensor, buckets: int) -> torch.Tensor:
    """Sums and counts [2, buckets] behind `bucket_means`, in double precision on the device of the losses.

    Sums and counts of several batches can be added.
    """
    index = (times * buckets).long().clamp(max=buckets - 1)
    both = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)])
    return torch.zeros(2, buckets, dtype=torch.float64, device=losses.device).index_add_(1, index, both)
