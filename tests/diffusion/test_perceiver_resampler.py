"""Perceiver resampler: shapes, masking, positions, null embeddings, learning."""

from __future__ import annotations

import pytest
import torch

from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler, pad_audio_tokens, sinusoidal_time_encoding


def resampler() -> PerceiverResampler:
    torch.manual_seed(0)
    return PerceiverResampler(input_width=12, bands=3, num_queries=5, output_width=16, dim=32, depth=2, heads=4)


def grids(*moments: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 3, 12, generator=generator) for count in moments]


def test_clips_of_any_length_give_a_fixed_number_of_tokens() -> None:
    model = resampler().eval()
    made, mask = pad_audio_tokens(grids(4, 9, 1))
    assert made.shape == (3, 9, 3, 12)
    assert mask.sum(1).tolist() == [4, 9, 1]
    tokens = model(made, mask)
    assert tokens.shape == (3, 5, 16)
    assert torch.isfinite(tokens).all()
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3


def test_padding_does_not_change_the_result() -> None:
    model = resampler().eval()
    batch, mask = pad_audio_tokens(grids(4, 9))
    noisy = torch.where(mask[:, :, None, None], batch, 1e3 * torch.randn(batch.shape))
    expected = model(batch, mask)
    torch.testing.assert_close(model(noisy, mask), expected)
    torch.testing.assert_close(model(batch[:1, :4], mask[:1, :4]), expected[:1], atol=1e-5, rtol=1e-4)


def test_time_and_bands_are_distinguished() -> None:
    model = resampler().eval()
    (grid,) = grids(6)
    every = torch.ones(1, 6, dtype=torch.bool)
    plain = model(grid[None], every)
    assert (model(grid.flip(0)[None], every) - plain).abs().max() > 1e-4, "the order in time has an effect"
    assert (model(grid.flip(1)[None], every) - plain).abs().max() > 1e-4, "the order of bands has an effect"
    codes = sinusoidal_time_encoding(50, 8)
    assert torch.cdist(codes, codes).fill_diagonal_(1.0).min() > 1e-3, "codes of different times differ"


def test_masked_clips_give_the_null_embeddings() -> None:
    model = resampler().eval()
    batch, mask = pad_audio_tokens(grids(4, 9))
    tokens = model(batch, mask, torch.tensor([True, False]))
    torch.testing.assert_close(tokens[0], model(batch, mask)[0])
    torch.testing.assert_close(tokens[1], model.image_proj(model.silence))


def test_the_resampler_learns_the_position_of_an_event_in_time() -> None:
    torch.manual_seed(0)
    model = PerceiverResampler(input_width=4, bands=1, num_queries=1, output_width=8, dim=32, depth=1, heads=2)
    head = torch.nn.Linear(8, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], 3e-3)
    generator = torch.Generator().manual_seed(2)

    def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.randn(size, 8, 1, 4, generator=generator) * 0.1
        late = torch.randint(2, (size,), generator=generator)
        made[torch.arange(size), torch.where(late == 1, 6, 1), 0, 0] += 3.0
        return made, late

    mask = torch.ones(64, 8, dtype=torch.bool)
    for _ in range(150):
        made, late = batch(64)
        loss = torch.nn.functional.cross_entropy(head(model(made, mask)[:, 0]), late)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made, late = batch(64)
    assert (head(model(made, mask)[:, 0]).argmax(1) == late).float().mean() > 0.9
    used = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0}
    assert {"queries", "band_codes", "project.weight", "image_proj.ff.net.2.weight"} <= used


def test_settings_rebuild_the_resampler_and_invalid_ones_are_rejected() -> None:
    model = resampler()
    again = PerceiverResampler(**model.settings)
    again.load_state_dict(model.state_dict())
    batch, mask = pad_audio_tokens(grids(3))
    torch.testing.assert_close(again.eval()(batch, mask), model.eval()(batch, mask))
    with pytest.raises(ValueError, match="heads"):
        PerceiverResampler(input_width=4, bands=1, dim=30, heads=4)
