"""Audio of the sweeps: levels, mixtures and reverberation have the properties that they claim."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.audio.loudness import integrated_loudness
from pipeline_steps.evaluate.abilities.stimuli import (
    LOUDNESS,
    PEAK,
    RATE,
    levels,
    mixtures,
    pad_tail,
    restore_level,
    reverberant,
    set_loudness,
)
from tests.evaluate.synthetic_dataset import tone

LOW, HIGH = tone(200.0, 0), tone(3200.0, 0)


def rms_db(samples: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(samples.astype(float) ** 2)))


def energy_at(samples: np.ndarray, hertz: float) -> float:
    spectrum = np.abs(np.fft.rfft(samples)) ** 2
    near = np.abs(np.fft.rfftfreq(len(samples), 1 / RATE) / hertz - 1) < 0.1
    return float(10 * np.log10(spectrum[near].sum()))


def test_mixtures_differ_in_balance_and_not_in_loudness() -> None:
    gains = (-24.0, 0.0, 24.0)
    mixed = mixtures(LOW, HIGH * 0.01, gains)
    assert [integrated_loudness(clip, RATE) for clip in mixed] == pytest.approx([LOUDNESS] * 3, abs=0.2)
    balance = [energy_at(clip, 3200) - energy_at(clip, 200) for clip in mixed]
    np.testing.assert_allclose(np.diff(balance), 24.0, atol=0.1)


def test_levels_are_gains_below_full_scale_and_can_be_undone() -> None:
    for clip in (LOW, LOW * 0.001, np.eye(1, 24_000, dtype=np.float32)[0]):
        swept = levels(clip, (-24.0, 0.0, 12.0))
        np.testing.assert_allclose(np.diff([rms_db(one) for one in swept]), [24.0, 12.0], atol=1e-3)
        assert max(np.abs(one).max() for one in swept) <= PEAK + 1e-6
        for one in swept:
            np.testing.assert_allclose(restore_level(one, swept[1]), swept[1], atol=1e-6)
    silence = np.zeros(1000, np.float32)
    assert not set_loudness(silence).any()
    assert not restore_level(silence, LOW).any()


@pytest.mark.parametrize("t60", [0.3, 1.0])
def test_reverberation_decays_by_sixty_decibel_in_its_time(t60: float) -> None:
    click = np.zeros(RATE // 2, np.float32)
    click[100] = 0.5
    wet = reverberant(click, (t60, 2.4), seed=0)[0].astype(float)
    assert len(wet) == len(pad_tail(click, 2.4))
    tail = wet[100 + RATE // 100 :] ** 2
    decay = 10 * np.log10(np.cumsum(tail[::-1])[::-1] / tail.sum())
    at_5, at_25 = (int(np.argmax(decay < level)) / RATE for level in (-5, -25))
    assert 3 * (at_25 - at_5) == pytest.approx(t60, rel=0.08)
    dry, tail_energy = wet[100] ** 2, (wet[101:] ** 2).sum()
    assert tail_energy / dry == pytest.approx(t60, rel=0.02)
