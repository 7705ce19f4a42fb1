"""The flow's mathematics, checked against identities that hold whatever the network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_steps.diffusion.rectified_flow import (
    bucket_means,
    classifier_free_guidance,
    interpolate,
    logit_normal_times,
    velocity_target,
)


def _pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 2, 2, generator=draws), torch.randn(3, 4, 2, 2, generator=draws)


def test_the_path_starts_at_the_picture_and_ends_in_noise() -> None:
    latents, noise = _pair(0)
    assert torch.equal(interpolate(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(interpolate(latents, noise, torch.ones(3)), noise)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 1.0))
def test_one_step_along_the_true_velocity_arrives(seed: int, time: float) -> None:
    latents, noise = _pair(seed)
    noisy = interpolate(latents, noise, torch.full((3,), time))
    assert torch.allclose(noisy - time * velocity_target(latents, noise), latents, atol=1e-5)


def test_logit_normal_times_have_the_median_asked_for() -> None:
    times = logit_normal_times(20_000, 1.0, 0.5, torch.Generator().manual_seed(0))
    assert float(times.min()) > 0
    assert float(times.max()) < 1
    assert float(times.median()) == pytest.approx(0.7311, abs=0.01)  # sigmoid(1)


def test_guidance_one_is_the_conditional_and_zero_the_unconditional_model() -> None:
    conditional, unconditional = _pair(1)
    assert torch.allclose(classifier_free_guidance(conditional, unconditional, 1.0), conditional)
    assert torch.equal(classifier_free_guidance(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(
        classifier_free_guidance(conditional, unconditional, 3.0) - conditional, 2 * (conditional - unconditional), atol=1e-5
    )


def test_bucket_means_split_by_time_and_leave_empty_ones_open() -> None:
    means = bucket_means(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0.1, 0.2, 0.99]), 4)
    assert means[0] == 2.0
    assert means[3] == 10.0
    assert means[1:3].isnan().all()
