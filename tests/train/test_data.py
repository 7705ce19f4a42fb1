"""What is seen at a step depends on the step alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.diffusion.audio_conditioner import ConditionerInput
from pipeline_steps.diffusion.autoencoder import PatchPCAAutoencoder
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.data import ScratchBatches, ScratchDataset, batch_indices, validation_batch


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 99))
def test_every_epoch_is_a_permutation_whatever_the_batch_size(count: int, batch_size: int, seed: int) -> None:
    steps = -(-2 * count // batch_size)
    seen = [row for step in range(steps) for row in batch_indices(count, batch_size, seed, step)]
    assert sorted(seen[:count]) == list(range(count))
    assert sorted(seen[count : 2 * count]) == list(range(count))


def _stream(first: int) -> ScratchBatches:
    draws = torch.Generator().manual_seed(0)
    pictures = torch.rand(5, 3, 16, 16, generator=draws) * 2 - 1
    codec = PatchPCAAutoencoder(4, 0.5, 0)
    codec.fit(pictures)
    tokens = [ConditionerInput(torch.randn(3, 2, 4, generator=draws), torch.randn(3, 10, generator=draws)) for _ in range(2)]
    config = TrainConfig.model_validate(
        {
            "seed": 1,
            "codec": {"channels": 4},
            "objective": {"coarse_channels": 2},
            "optimiser": {
                "compose": {"steps": 3, "batch_size": 3, "learning_rate": 1e-3},
                "refine": {"steps": 9, "batch_size": 2, "learning_rate": 1e-3},
            },
        }
    )
    return ScratchBatches(ScratchDataset(pictures, [0, 1, 0, 1, 0], tokens), codec, config, first)


def test_a_stream_started_late_goes_on_as_the_first_would_have() -> None:
    early, late = iter(_stream(0)), iter(_stream(2))
    for _ in range(2):
        next(early)
    for _ in range(3):
        a, b = next(early), next(late)
        assert (a.step, a.rows) == (b.step, b.rows)
        for name in ("latents", "noise", "times", "heard"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        assert torch.equal(a.tokens.frames, b.tokens.frames)


def test_each_phase_has_its_batch_size() -> None:
    stream = _stream(0)
    assert [len(stream.batch(step).rows) for step in range(5)] == [3, 3, 3, 2, 2]


def test_about_the_asked_share_of_sounds_is_withheld() -> None:
    stream = _stream(0)
    heard = torch.cat([stream.batch(step).heard for step in range(200)])
    assert 0.80 < float(heard.float().mean()) < 0.90


def test_validation_is_fixed_and_spreads_times_evenly() -> None:
    stream = _stream(0)
    first, second = (validation_batch(stream.data, stream.codec, 0) for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first.noise, second.noise)
    assert first.times.tolist() == [0.1, 0.3, 0.5, 0.7, 0.9] or torch.allclose(
        first.times, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    )
    assert validation_batch(ScratchDataset(stream.data.pictures[:0], [], []), stream.codec, 0) is None
