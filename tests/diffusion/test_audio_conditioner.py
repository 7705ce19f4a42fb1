"""The audio conditioner: shapes, loudness, and what happens without a sound."""

import numpy as np
import pytest
import torch

from pipeline_steps.diffusion.audio_conditioner import AudioConditioner, PCAWhitening, collate
from pipeline_steps.diffusion.audio_features import AudioFeatures, preprocess_waveform


def _sound(seed: int, patches: int = 5, level: float = -20.0) -> AudioFeatures:
    draws = torch.Generator().manual_seed(seed)
    frames = torch.rand(patches * 3, 1024, generator=draws)
    return AudioFeatures(frames, torch.randn(patches, 521, generator=draws), torch.tensor([level, level + 10]))


@pytest.fixture(scope="module")
def conditioner() -> AudioConditioner:
    torch.manual_seed(0)
    model = AudioConditioner(frames=4, frame_components=8, tag_components=6, width=32, layers=1, dropout=0.1)
    model.fit([_sound(seed) for seed in range(12)])
    return model.eval()


@pytest.mark.parametrize("patches", [1, 2, 7, 30])
def test_any_length_gives_the_same_number_of_tokens(conditioner: AudioConditioner, patches: int) -> None:
    tokens = conditioner.tokens(_sound(0, patches))
    assert tokens.frames.shape == (1, 4, 8)
    assert tokens.summary.shape == (1, 16)
    assert conditioner(tokens, torch.tensor([True])).shape == (1, 5, 32)


def test_loudness_changes_the_tokens(conditioner: AudioConditioner) -> None:
    quiet, loud = conditioner.tokens(_sound(0, level=-45.0)), conditioner.tokens(_sound(0, level=-10.0))
    heard = torch.tensor([True])
    assert not torch.allclose(conditioner(quiet, heard), conditioner(loud, heard))


def test_a_withheld_sound_leaves_no_trace(conditioner: AudioConditioner) -> None:
    tokens = collate([conditioner.tokens(_sound(0)), conditioner.tokens(_sound(1))])
    silent = conditioner(tokens, torch.tensor([False, False]))
    assert torch.equal(silent[0], silent[1])
    heard = conditioner(tokens, torch.tensor([True, False]))
    assert torch.equal(heard[1], silent[1])
    assert not torch.allclose(heard[0], silent[0])


def test_whitening_decorrelates_halves_the_spread_and_has_unit_size() -> None:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 4, generator=draws) * torch.tensor([16.0, 4.0, 1.0, 0.25]) @ torch.linalg.qr(torch.randn(4, 4))[0]
    axes = PCAWhitening(4, 4)
    axes.fit(rows)
    covariance = axes(rows).T.cov()
    assert torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=1e-3)
    assert float(covariance.diagonal().mean()) == pytest.approx(1.0, rel=1e-2)
    ratio = (covariance[0, 0] / covariance[2, 2]).sqrt()
    assert float(ratio) == pytest.approx(4.0, rel=0.2)  # 16 before


@pytest.mark.parametrize("rows", [torch.zeros(3, 8), torch.full((3, 8), 0.7), torch.randn(1, 8)])
def test_rows_that_are_all_alike_score_nothing(rows: torch.Tensor) -> None:
    axes = PCAWhitening(8, 4)
    axes.fit(rows)
    assert axes(rows).abs().max() < 1e-5
    assert axes(rows + 1).isfinite().all()


def test_a_window_keeps_its_own_frames() -> None:
    sound = _sound(0, patches=6)
    part = sound.window(2, 3)
    assert part.patches == 3
    assert torch.equal(part.frames, sound.frames[6:15])
    assert torch.equal(part.level, sound.level)


def test_short_sounds_are_repeated_long_ones_cut_and_none_is_scaled() -> None:
    short = np.linspace(0.1, 0.2, 4800, dtype=np.float32)
    assert len(preprocess_waveform(short, 10.0)) == 2 * 16_000
    long = np.full(48_000 * 12, 0.25, np.float32)
    prepared = preprocess_waveform(long, 10.0)
    assert len(prepared) == 10 * 16_000
    assert float(np.median(prepared)) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize("samples", [np.zeros(0, np.float32), np.full(100, np.nan, np.float32), np.zeros((2, 9), np.float32)])
def test_what_is_no_sound_is_refused(samples: np.ndarray) -> None:
    with pytest.raises(ValueError, match="mono"):
        preprocess_waveform(samples, 10.0)


def test_a_new_sound_is_expressed_in_the_known_ones_and_keeps_its_loudness() -> None:
    torch.manual_seed(0)
    model = AudioConditioner(8, 8, 6, 32, 1, 0.1, memory=4, memory_temperature=0.01).eval()
    known = [_sound(seed) for seed in range(3)]
    model.fit([*known, *(_sound(seed) for seed in range(3, 12))])
    plain = [model.tokens(sound) for sound in known]
    model.remember(known)
    for sound, before in zip(known, plain, strict=True):  # a known sound stays what it is
        assert torch.allclose(model.tokens(sound).summary, before.summary, atol=1e-3)
        assert torch.allclose(model.tokens(sound).frames, before.frames, atol=1e-3)
    frames = torch.cat([item.frames for item in plain])
    near = AudioFeatures(known[1].frames * 1.02, known[1].logits, torch.tensor([-40.0, -30.0]))
    heard = model.tokens(near)
    assert torch.allclose(heard.frames[0], frames[1], atol=0.05)
    assert heard.summary[0, -2] < plain[1].summary[0, -2] - 1.0  # quieter, and said so
    stranger = model.tokens(_sound(40)).summary[:, :-2]
    hull = torch.cat([item.summary[:, :-2] for item in plain])
    weights = torch.linalg.lstsq(hull.T, stranger.T).solution
    assert torch.allclose(weights.T @ hull, stranger, atol=1e-3)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-3)


def test_a_memory_smaller_than_the_training_set_takes_an_even_share() -> None:
    model = AudioConditioner(4, 8, 6, 32, 1, 0.1, memory=3)
    sounds = [_sound(seed) for seed in range(9)]
    model.fit(sounds)
    expected = torch.cat([model.tokens(sounds[index]).summary[:, :-2] for index in (0, 4, 8)])
    model.remember(sounds)
    assert int(model.memory.filled) == 3
    assert torch.allclose(model.memory.summaries, expected)
