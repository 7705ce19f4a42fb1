"""Sampling of every pipeline: initial noise and guidance."""

from __future__ import annotations

import torch

from pipeline_steps.diffusion.pipelines.base import classifier_free_guidance, initial_latents


def test_initial_latents_are_a_function_of_seed_and_index() -> None:
    noise = initial_latents(0, 0, (2, 2, 2))
    assert torch.equal(noise, initial_latents(0, 0, (2, 2, 2)))
    assert not torch.equal(noise, initial_latents(0, 1, (2, 2, 2)))
    assert not torch.equal(noise, initial_latents(1, 0, (2, 2, 2)))


def test_guidance_one_is_the_conditional_and_zero_the_unconditional_model() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(classifier_free_guidance(conditional, unconditional, 1.0), conditional)
    assert torch.equal(classifier_free_guidance(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(
        classifier_free_guidance(conditional, unconditional, 3.0) - conditional, 2 * (conditional - unconditional), atol=1e-5
    )
