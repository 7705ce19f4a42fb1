"""The denoiser before training is the linear guess, and its parts take turns."""

import pytest
import torch

from pipeline_steps.diffusion.audio_conditioner import AudioConditioner, ConditionerInput
from pipeline_steps.diffusion.denoiser import Denoiser, build_unet
from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser, timestep_embedding


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    conditioner = AudioConditioner(frames=2, frame_components=4, tag_components=4, width=32, layers=1, dropout=0.0)
    composer = MLPDenoiser(6, 4, conditioner.summary_width, width=24, blocks=1, dropout=0.0)
    prior = GaussianDenoiser(6, 4, 3)
    prior.fit(torch.randn(50, 6, 4, 4))
    return Denoiser(build_unet(12, 6, 4, (32, 32), 32, 16), conditioner, composer, prior, "residual").eval()


@pytest.fixture
def tokens(denoiser: Denoiser) -> ConditionerInput:
    return ConditionerInput(torch.randn(3, 2, 4), torch.randn(3, denoiser.conditioner.summary_width))


TIMES = torch.tensor([0.2, 0.6, 1.0])


@pytest.mark.parametrize("refining", [False, True])
def test_untrained_it_follows_the_linear_guess(denoiser: Denoiser, tokens: ConditionerInput, refining: bool) -> None:
    denoiser.refining = refining
    noisy = torch.randn(3, 6, 4, 4)
    velocity = denoiser(noisy, TIMES, tokens, torch.ones(3, dtype=torch.bool))
    expected = (noisy - denoiser.prior.denoise(noisy, TIMES)) / TIMES[:, None, None, None]
    assert torch.allclose(velocity, expected, atol=1e-5)


def test_each_phase_moves_its_own_part(denoiser: Denoiser, tokens: ConditionerInput) -> None:
    noisy, heard = torch.randn(3, 6, 4, 4), torch.ones(3, dtype=torch.bool)
    for refining in (False, True):
        denoiser.refining = refining
        denoiser.zero_grad(set_to_none=True)
        denoiser(noisy, TIMES, tokens, heard).square().mean().backward()
        moved = {name.split(".")[0] for name, value in denoiser.named_parameters() if value.grad is not None}
        assert ("composer" in moved) is not refining
        assert ("unet" in moved) is refining


def test_composer_hears_and_tells_times_apart() -> None:
    torch.manual_seed(0)
    composer = MLPDenoiser(2, 4, 5, width=32, blocks=2, dropout=0.0)
    torch.nn.init.normal_(composer.leave.weight)
    torch.nn.init.normal_(composer.blocks[0].second.weight)
    seen, heard = torch.randn(1, 2, 4, 4), torch.tensor([True])
    first, second = (composer.encode_audio(torch.randn(1, 5), heard) for _ in range(2))
    time = torch.tensor([0.5])
    assert composer(seen, time, first).shape == seen.shape
    assert not torch.allclose(composer(seen, time, first), composer(seen, time, second))
    assert not torch.allclose(composer(seen, time, first), composer(seen, time + 0.3, first))
    assert torch.equal(composer.encode_audio(torch.randn(1, 5), ~heard), composer.encode_audio(torch.randn(1, 5), ~heard))


def test_time_features_are_bounded_and_distinct() -> None:
    features = timestep_embedding(torch.linspace(0, 1, 50))
    assert features.shape == (50, 64)
    assert float(features.abs().max()) <= 1.0
    assert float(torch.cdist(features, features).add(torch.eye(50) * 9).min()) > 0.1
