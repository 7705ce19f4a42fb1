"""The Gaussian guess, checked where the answer is known."""

import pytest
import torch

from pipeline_steps.diffusion.flow import at_time
from pipeline_steps.diffusion.prior import GaussianPrior, ridge

COUNT = 4000


def _world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [N, 3, 2, 2] (two correlated coarse channels, moved by the sound; one fine channel), summaries [N, 5], groups."""
    draws = torch.Generator().manual_seed(0)
    summaries = torch.randn(COUNT, 5, generator=draws)
    coarse = torch.randn(COUNT, 3, generator=draws) @ torch.randn(3, 8, generator=draws) + torch.randn(8, generator=draws)
    coarse = coarse + 0.5 * torch.randn(COUNT, 8, generator=draws) + summaries @ torch.randn(5, 8, generator=draws)
    fine = 0.2 * torch.randn(COUNT, 4, generator=draws)
    return torch.cat([coarse, fine], 1).view(COUNT, 3, 2, 2), summaries, torch.arange(COUNT) // 4


@pytest.fixture(scope="module")
def world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _world()


@pytest.fixture(scope="module")
def prior(world: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> GaussianPrior:
    fitted = GaussianPrior(3, 2, 2, 5)
    assert fitted.fit(*world) > 0.3
    return fitted


def _mean(prior: GaussianPrior, summaries: torch.Tensor, heard: bool = True) -> torch.Tensor:
    return prior.expect(summaries, torch.full((len(summaries),), heard))


def test_without_noise_it_keeps_everything_and_in_pure_noise_it_says_the_mean(
    prior: GaussianPrior, world: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    some, mean = world[0][:8], _mean(prior, world[1][:8])
    assert torch.allclose(prior.denoise(some, torch.full((8,), 1e-3), mean), some, atol=0.02)
    noise = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(prior.denoise(noise, torch.ones(8), mean), mean, atol=1e-4)


@pytest.mark.parametrize("time", [0.3, 0.6, 0.9])
def test_it_is_nearly_the_best_linear_guess_and_hearing_helps(
    prior: GaussianPrior, world: tuple[torch.Tensor, torch.Tensor, torch.Tensor], time: float
) -> None:
    latents, summaries, _ = world
    times = torch.full((COUNT,), time)
    noisy = at_time(latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(2)), times)
    error = (prior.denoise(noisy, times, _mean(prior, summaries)) - latents).square().mean()
    assert error < (prior.denoise(noisy, times, _mean(prior, summaries, False)) - latents).square().mean()
    rows = torch.cat([noisy.flatten(1), summaries, torch.ones(COUNT, 1)], 1)
    best = rows @ torch.linalg.lstsq(rows, latents.flatten(1)).solution
    assert float(error) < 1.1 * float((best - latents.flatten(1)).square().mean())


def test_sounds_that_say_nothing_move_nothing(world: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    latents, _, groups = world
    unrelated = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(5))
    prior = GaussianPrior(3, 2, 2, 5)
    assert prior.fit(latents[:200], unrelated[:200], groups[:200]) < 0.05
    moved = _mean(prior, unrelated) - prior.mean
    assert float(moved.square().mean()) < 0.1 * float(latents.var())


def test_scales_bring_inputs_to_unit_size(prior: GaussianPrior, world: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    latents, summaries, _ = world
    times = torch.full((COUNT,), 0.5)
    noisy = at_time(latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(3)), times)
    mean = _mean(prior, summaries)
    scale_in, scale_out = prior.scales(times)
    assert torch.allclose(((noisy - 0.5 * mean) * scale_in).std(0), torch.ones(3, 2, 2), atol=0.05)
    fine = prior.denoise(noisy, times, mean)[:, 2] - latents[:, 2]
    assert torch.allclose(fine.std(0), scale_out[0, 2], rtol=0.1)


def test_ridge_recovers_a_slope_and_a_large_penalty_removes_it() -> None:
    draws = torch.Generator().manual_seed(0)
    inputs, slope = torch.randn(300, 4, generator=draws).double(), torch.randn(4, 2, generator=draws).double()
    assert torch.allclose(ridge(inputs, inputs @ slope, 1e-9), slope, atol=1e-6)
    assert float(ridge(inputs, inputs @ slope, 1e6).abs().max()) < 1e-4
