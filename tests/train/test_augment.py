"""Views of sounds and pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline_steps.train.augment import coloured_noise, mix_tracks, picture_views, sound_view
from pipeline_steps.train.config import PictureConfig, SoundConfig

TONE = (0.2 * np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000)).astype(np.float32)


def test_tracks_are_added_with_their_gains_and_not_normalised() -> None:
    assert np.allclose(mix_tracks([(TONE, 0.0)]), TONE)
    assert np.allclose(mix_tracks([(TONE, -20.0)]), TONE * 0.1, atol=1e-6)
    mixed = mix_tracks([(TONE, 0.0), (np.full(3, 0.1, np.float32), 0.0)])
    assert np.allclose(mixed, TONE + 0.1, atol=1e-6)


def test_a_view_is_a_function_of_its_generator() -> None:
    views = [sound_view(TONE, TONE[::-1], SoundConfig(), np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert np.array_equal(views[0], views[1])
    assert not (len(views[0]) == len(views[2]) and np.array_equal(views[0], views[2]))


def test_gain_speed_and_range_stay_within_their_bounds() -> None:
    config = SoundConfig(speed=0.1, gain_db=6.0, noise_share=0.0, mix_share=0.0)
    for seed in range(30):
        view = sound_view(TONE, None, config, np.random.default_rng(seed))
        assert 16_000 * np.exp(-0.101) - 1 <= len(view) <= 16_000 * np.exp(0.101) + 1
        change = 20 * np.log10(view.std() / TONE.std())
        assert abs(change) <= 6.1
        assert np.abs(view).max() <= 1.0


def test_noise_is_of_unit_deviation_and_pink_falls() -> None:
    white, pink = (coloured_noise(16_000, slope, np.random.default_rng(0)) for slope in (0.0, 0.5))
    assert white.std() == pytest.approx(1.0)
    spectrum = np.abs(np.fft.rfft(pink))
    assert spectrum[10:100].mean() > 3 * spectrum[4000:].mean()


def test_picture_views_keep_shape_range_and_white_borders() -> None:
    pictures = torch.ones(6, 3, 32, 32)
    pictures[:, :, 10:20, 10:14] = -1.0
    views = picture_views(pictures, PictureConfig(scale=0.12, shift=0.06), torch.Generator().manual_seed(0))
    assert views.shape == pictures.shape
    assert float(views[:, :, 0, :].min()) == pytest.approx(1.0)
    assert float(views.min()) >= -1.001
    assert len({round(float(view.sum()), 3) for view in views}) > 3
