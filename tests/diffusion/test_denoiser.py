"""The denoiser before training is the Gaussian prior, and its parts are trained in turn."""

import pytest
import torch

from pipeline_steps.diffusion.audio_conditioner import AudioConditioner, ConditionerInput
from pipeline_steps.diffusion.denoiser import Denoiser, build_unet
from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser, timestep_embedding


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    conditioner = AudioConditioner(num_time_tokens=2, frame_pca_dim=4, tag_pca_dim=4, hidden_dim=32, num_layers=1, dropout=0.0)
    mlp = MLPDenoiser(6, 4, conditioner.summary_width, hidden_dim=24, num_blocks=1, dropout=0.0)
    prior = GaussianDenoiser(6, 4, 3)
    prior.fit(torch.randn(50, 6, 4, 4))
    return Denoiser(build_unet(12, 6, 4, (32, 32), 32, 16), conditioner, mlp, prior, "residual").eval()


@pytest.fixture
def tokens(denoiser: Denoiser) -> ConditionerInput:
    return ConditionerInput(torch.randn(3, 2, 4), torch.randn(3, denoiser.conditioner.summary_width))


TIMES = torch.tensor([0.2, 0.6, 1.0])


@pytest.mark.parametrize("use_unet", [False, True])
def test_untrained_it_is_the_gaussian_prior(denoiser: Denoiser, tokens: ConditionerInput, use_unet: bool) -> None:
    denoiser.use_unet = use_unet
    noisy = torch.randn(3, 6, 4, 4)
    velocity = denoiser(noisy, TIMES, tokens, torch.ones(3, dtype=torch.bool))
    expected = (noisy - denoiser.prior.denoise(noisy, TIMES)) / TIMES[:, None, None, None]
    assert torch.allclose(velocity, expected, atol=1e-5)


def test_each_phase_moves_its_own_part(denoiser: Denoiser, tokens: ConditionerInput) -> None:
    noisy, mask = torch.randn(3, 6, 4, 4), torch.ones(3, dtype=torch.bool)
    for use_unet in (False, True):
        denoiser.use_unet = use_unet
        denoiser.zero_grad(set_to_none=True)
        denoiser(noisy, TIMES, tokens, mask).square().mean().backward()
        moved = {name.split(".")[0] for name, value in denoiser.named_parameters() if value.grad is not None}
        assert ("mlp" in moved) is not use_unet
        assert ("unet" in moved) is use_unet


def test_mlp_depends_on_audio_and_time() -> None:
    torch.manual_seed(0)
    mlp = MLPDenoiser(2, 4, 5, hidden_dim=32, num_blocks=2, dropout=0.0)
    torch.nn.init.normal_(mlp.leave.weight)
    torch.nn.init.normal_(mlp.blocks[0].second.weight)
    noisy, mask = torch.randn(1, 2, 4, 4), torch.tensor([True])
    first, second = (mlp.embed_audio(torch.randn(1, 5), mask) for _ in range(2))
    time = torch.tensor([0.5])
    assert mlp(noisy, time, first).shape == noisy.shape
    assert not torch.allclose(mlp(noisy, time, first), mlp(noisy, time, second))
    assert not torch.allclose(mlp(noisy, time, first), mlp(noisy, time + 0.3, first))
    assert torch.equal(mlp.embed_audio(torch.randn(1, 5), ~mask), mlp.embed_audio(torch.randn(1, 5), ~mask))


def test_time_features_are_bounded_and_distinct() -> None:
    features = timestep_embedding(torch.linspace(0, 1, 50))
    assert features.shape == (50, 64)
    assert float(features.abs().max()) <= 1.0
    assert float(torch.cdist(features, features).add(torch.eye(50) * 9).min()) > 0.1
