"""The Gaussian denoiser, checked against known solutions."""

import pytest
import torch

from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.rectified_flow import interpolate


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Latents [4000, 3, 2, 2]: two coarse channels driven by few factors and noise, one fine channel of small noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4000, 3, generator=generator) @ torch.randn(3, 8, generator=generator) + torch.randn(
        8, generator=generator
    )
    coarse = coarse + 0.5 * torch.randn(4000, 8, generator=generator)
    fine = 0.2 * torch.randn(4000, 4, generator=generator)
    return torch.cat([coarse, fine], 1).view(4000, 3, 2, 2)


@pytest.fixture(scope="module")
def prior(latents: torch.Tensor) -> GaussianDenoiser:
    fitted = GaussianDenoiser(3, 2, 2)
    fitted.fit(latents)
    return fitted


def test_without_noise_it_is_the_identity_and_in_pure_noise_the_mean(prior: GaussianDenoiser, latents: torch.Tensor) -> None:
    some = latents[:8]
    assert torch.allclose(prior.denoise(some, torch.full((8,), 1e-3)), some, atol=0.02)
    noise = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(prior.denoise(noise, torch.ones(8)), prior.mean.expand(8, -1, -1, -1), atol=1e-4)


@pytest.mark.parametrize("time", [0.3, 0.6, 0.9])
def test_it_beats_the_diagonal_prior_and_nearly_reaches_the_best_linear_one(
    prior: GaussianDenoiser, latents: torch.Tensor, time: float
) -> None:
    times = torch.full((len(latents),), time)
    noisy = interpolate(latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)), times)
    error = (prior.denoise(noisy, times) - latents).square().mean()
    alone = GaussianDenoiser(3, 2, 1)
    alone.fit(latents)
    assert error < (alone.denoise(noisy, times) - latents).square().mean()
    rows = torch.cat([noisy.flatten(1), torch.ones(len(noisy), 1)], 1)
    best = rows @ torch.linalg.lstsq(rows, latents.flatten(1)).solution
    assert float(error) < 1.1 * float((best - latents.flatten(1)).square().mean())


def test_scales_bring_inputs_to_unit_size(prior: GaussianDenoiser, latents: torch.Tensor) -> None:
    times = torch.full((len(latents),), 0.5)
    noisy = interpolate(latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(3)), times)
    scale_in, scale_out = prior.preconditioning(times)
    assert torch.allclose(((noisy - 0.5 * prior.mean) * scale_in).std(0), torch.ones(3, 2, 2), atol=0.05)
    fine = prior.denoise(noisy, times)[:, 2] - latents[:, 2]
    assert torch.allclose(fine.std(0), scale_out[0, 2], rtol=0.1)
