"""Sampling of every pipeline: initial noise, guidance, interpolation of encoded clips."""

from __future__ import annotations

import torch

from pipeline_steps.diffusion.ip_adapter import AudioEmbeds
from pipeline_steps.diffusion.pipelines.base import classifier_free_guidance, initial_latents, interpolate_embeds, slerp


def test_initial_latents_are_a_function_of_seed_and_index() -> None:
    noise = initial_latents(0, 0, (2, 2, 2))
    assert torch.equal(noise, initial_latents(0, 0, (2, 2, 2)))
    assert not torch.equal(noise, initial_latents(0, 1, (2, 2, 2)))
    assert not torch.equal(noise, initial_latents(1, 0, (2, 2, 2)))


def test_guidance_1_is_conditional_and_guidance_0_unconditional() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(classifier_free_guidance(conditional, unconditional, 1.0), conditional)
    assert torch.equal(classifier_free_guidance(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(
        classifier_free_guidance(conditional, unconditional, 3.0) - conditional, 2 * (conditional - unconditional), atol=1e-5
    )


def test_interpolation_is_spherical_in_direction_and_linear_in_norm() -> None:
    first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    halfway = slerp(first, second, 0.5)
    torch.testing.assert_close(halfway, torch.tensor([[3.0, 3.0]]) / 2**0.5)
    third = slerp(first, second, 1 / 3)
    torch.testing.assert_close(third, third.norm() * torch.tensor([[3**0.5 / 2, 0.5]]))
    for ends in ((first, second), (first, 3 * first), (first, torch.zeros(1, 2))):
        torch.testing.assert_close(slerp(*ends, 0.0), ends[0])
        torch.testing.assert_close(slerp(*ends, 1.0), ends[1])
    assert slerp(first, -first, 0.5).isfinite().all()


def test_every_tensor_of_an_encoded_clip_is_interpolated() -> None:
    torch.manual_seed(0)
    first, second = (AudioEmbeds(torch.randn(1, 4, 8), torch.randn(1, 7, 10)) for _ in range(2))
    between = interpolate_embeds(first, second, 0.25)
    torch.testing.assert_close(between.embeds, slerp(first.embeds, second.embeds, 0.25))
    torch.testing.assert_close(between.text, slerp(first.text, second.text, 0.25))
