"""The audio conditioner: shapes, loudness, and the null condition."""

import numpy as np
import pytest
import torch

from pipeline_steps.diffusion.audio_conditioner import AudioConditioner, PCAWhitening, collate
from pipeline_steps.diffusion.audio_features import AudioFeatures, preprocess_waveform


def _features(seed: int, patches: int = 5, level: float = -20.0) -> AudioFeatures:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.rand(patches * 3, 1024, generator=generator)
    return AudioFeatures(frames, torch.randn(patches, 521, generator=generator), torch.tensor([level, level + 10]))


@pytest.fixture(scope="module")
def conditioner() -> AudioConditioner:
    torch.manual_seed(0)
    model = AudioConditioner(num_time_tokens=4, frame_pca_dim=8, tag_pca_dim=6, hidden_dim=32, num_layers=1, dropout=0.1)
    model.fit([_features(seed) for seed in range(12)])
    return model.eval()


@pytest.mark.parametrize("patches", [1, 2, 7, 30])
def test_any_length_gives_the_same_number_of_tokens(conditioner: AudioConditioner, patches: int) -> None:
    tokens = conditioner.encode(_features(0, patches))
    assert tokens.frames.shape == (1, 4, 8)
    assert tokens.summary.shape == (1, 16)
    assert conditioner(tokens, torch.tensor([True])).shape == (1, 5, 32)


def test_loudness_changes_the_tokens(conditioner: AudioConditioner) -> None:
    quiet, loud = conditioner.encode(_features(0, level=-45.0)), conditioner.encode(_features(0, level=-10.0))
    mask = torch.tensor([True])
    assert not torch.allclose(conditioner(quiet, mask), conditioner(loud, mask))


def test_the_null_tokens_do_not_depend_on_the_audio(conditioner: AudioConditioner) -> None:
    tokens = collate([conditioner.encode(_features(0)), conditioner.encode(_features(1))])
    null = conditioner(tokens, torch.tensor([False, False]))
    assert torch.equal(null[0], null[1])
    mixed = conditioner(tokens, torch.tensor([True, False]))
    assert torch.equal(mixed[1], null[1])
    assert not torch.allclose(mixed[0], null[0])


def test_whitening_decorrelates_halves_the_spread_and_has_unit_size() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(500, 4, generator=generator) * torch.tensor([16.0, 4.0, 1.0, 0.25]) @ torch.linalg.qr(torch.randn(4, 4))[0]
    )
    axes = PCAWhitening(4, 4)
    axes.fit(rows)
    covariance = axes(rows).T.cov()
    assert torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=1e-3)
    assert float(covariance.diagonal().mean()) == pytest.approx(1.0, rel=1e-2)
    ratio = (covariance[0, 0] / covariance[2, 2]).sqrt()
    assert float(ratio) == pytest.approx(4.0, rel=0.2)  # 16 before


@pytest.mark.parametrize("rows", [torch.zeros(3, 8), torch.full((3, 8), 0.7), torch.randn(1, 8)])
def test_identical_rows_have_zero_scores(rows: torch.Tensor) -> None:
    axes = PCAWhitening(8, 4)
    axes.fit(rows)
    assert axes(rows).abs().max() < 1e-5
    assert axes(rows + 1).isfinite().all()


def test_a_window_keeps_its_own_frames() -> None:
    sound = _features(0, patches=6)
    part = sound.window(2, 3)
    assert part.patches == 3
    assert torch.equal(part.frames, sound.frames[6:15])
    assert torch.equal(part.level, sound.level)


def test_short_clips_are_repeated_long_ones_cut_and_none_is_scaled() -> None:
    short = np.linspace(0.1, 0.2, 4800, dtype=np.float32)
    assert len(preprocess_waveform(short, 10.0)) == 2 * 16_000
    long = np.full(48_000 * 12, 0.25, np.float32)
    prepared = preprocess_waveform(long, 10.0)
    assert len(prepared) == 10 * 16_000
    assert float(np.median(prepared)) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("samples", [np.zeros(0, np.float32), np.full(100, np.nan, np.float32), np.zeros((2, 9), np.float32)])
def test_invalid_samples_are_rejected(samples: np.ndarray) -> None:
    with pytest.raises(ValueError, match="mono"):
        preprocess_waveform(samples, 10.0)


def test_a_new_clip_is_mapped_to_stored_ones_and_keeps_its_loudness() -> None:
    torch.manual_seed(0)
    model = AudioConditioner(8, 8, 6, 32, 1, 0.1, retrieval_memory_size=4, retrieval_temperature=0.01).eval()
    stored = [_features(seed) for seed in range(3)]
    model.fit([*stored, *(_features(seed) for seed in range(3, 12))])
    plain = [model.encode(sound) for sound in stored]
    model.fill_memory(stored)
    for sound, before in zip(stored, plain, strict=True):  # a stored clip maps to itself
        assert torch.allclose(model.encode(sound).summary, before.summary, atol=1e-3)
        assert torch.allclose(model.encode(sound).frames, before.frames, atol=1e-3)
    frames = torch.cat([item.frames for item in plain])
    near = AudioFeatures(stored[1].frames * 1.02, stored[1].logits, torch.tensor([-40.0, -30.0]))
    encoded = model.encode(near)
    assert torch.allclose(encoded.frames[0], frames[1], atol=0.05)
    assert encoded.summary[0, -2] < plain[1].summary[0, -2] - 1.0  # quieter
    stranger = model.encode(_features(40)).summary[:, :-2]
    hull = torch.cat([item.summary[:, :-2] for item in plain])
    weights = torch.linalg.lstsq(hull.T, stranger.T).solution
    assert torch.allclose(weights.T @ hull, stranger, atol=1e-3)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-3)


def test_a_memory_smaller_than_the_training_set_takes_evenly_spaced_clips() -> None:
    model = AudioConditioner(4, 8, 6, 32, 1, 0.1, retrieval_memory_size=3)
    sounds = [_features(seed) for seed in range(9)]
    model.fit(sounds)
    expected = torch.cat([model.encode(sounds[index]).summary[:, :-2] for index in (0, 4, 8)])
    model.fill_memory(sounds)
    assert int(model.memory.filled) == 3
    assert torch.allclose(model.memory.summaries, expected)
