"""Augmentation of sounds."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.train.audio_feature_cache import MIX_POOL_SIZE, Tracks, mix_partner
from pipeline_steps.train.augmentations import augment_audio, colored_noise
from pipeline_steps.train.config_groups import AudioEncodingConfig

TONE = (0.2 * np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000)).astype(np.float32)


def test_an_augmented_clip_depends_on_its_generator_only() -> None:
    views = [augment_audio(TONE, TONE[::-1], AudioEncodingConfig(), np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert np.array_equal(views[0], views[1])
    assert not (len(views[0]) == len(views[2]) and np.array_equal(views[0], views[2]))


def test_gain_speed_and_range_stay_within_their_bounds() -> None:
    config = AudioEncodingConfig(max_log_speed=0.1, max_gain_db=6.0, noise_prob=0.0, mix_prob=0.0)
    for seed in range(30):
        augmented = augment_audio(TONE, None, config, np.random.default_rng(seed))
        assert 16_000 * np.exp(-0.101) - 1 <= len(augmented) <= 16_000 * np.exp(0.101) + 1
        change = 20 * np.log10(augmented.std() / TONE.std())
        assert abs(change) <= 6.1
        assert np.abs(augmented).max() <= 1.0


def test_reverberation_has_its_probability_and_is_off_by_default() -> None:
    impulses = [np.array([1.0, 0.0, 0.9], np.float32)]
    plain = AudioEncodingConfig(max_log_speed=0.0, noise_prob=0.0, mix_prob=0.0)
    half = plain.model_copy(update={"reverb_prob": 0.5})
    noise = np.random.default_rng(0).normal(0, 0.05, 4000).astype(np.float32)
    without, beside = (augment_audio(noise, None, plain, np.random.default_rng(1), given) for given in ((), impulses))
    assert np.array_equal(without, beside)
    changed = 0
    for seed in range(60):
        augmented = augment_audio(noise, None, half, np.random.default_rng(seed), impulses)
        changed += float(np.mean(augmented[2:] * augmented[:-2]) / np.mean(augmented**2)) > 0.3  # echo of the impulse response
        assert abs(20 * np.log10(augmented.std() / noise.std())) < plain.max_gain_db + 0.1, "reverberation keeps the level"
    assert 18 <= changed <= 42


def test_the_fingerprint_of_augmentations_contains_reverberation_only_if_used() -> None:
    assert "reverb_share" not in AudioEncodingConfig().augmentation_identity()
    assert AudioEncodingConfig(reverb_prob=0.2).augmentation_identity()["reverb_share"] == 0.2
    assert "num_augmentations" not in AudioEncodingConfig(reverb_prob=0.2).augmentation_identity()


def test_mix_partners_are_chosen_among_a_bounded_number_of_clips() -> None:
    pool: list[Tracks] = [((f"{number:032x}", 0.0),) for number in range(MIX_POOL_SIZE + 40)]
    small, first = pool[:MIX_POOL_SIZE], pool[0]
    for tracks in (pool[7], pool[-1]):
        others = [other for other in small if other != tracks]
        best = min(others, key=lambda other: fingerprint([tracks, 1, other]))
        assert mix_partner(tracks, 1, small) == mix_partner(tracks, 1, pool) == best
    before = {tracks: mix_partner(tracks, 1, pool[1:]) for tracks in pool[1:]}
    moved = [tracks for tracks, other in before.items() if mix_partner(tracks, 1, pool) != other]
    gone = pool[MIX_POOL_SIZE]
    assert all(before[tracks] == gone or mix_partner(tracks, 1, pool) == first for tracks in moved)
    assert len(moved) < 10
    assert mix_partner(first, 0, pool) == ()


def test_noise_has_unit_deviation_and_the_spectrum_of_pink_noise_falls() -> None:
    white, pink = (colored_noise(16_000, slope, np.random.default_rng(0)) for slope in (0.0, 0.5))
    assert white.std() == pytest.approx(1.0)
    spectrum = np.abs(np.fft.rfft(pink))
    assert spectrum[10:100].mean() > 3 * spectrum[4000:].mean()
