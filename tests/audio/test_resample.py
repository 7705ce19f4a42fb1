"""Resampling keeps pitch, length and silence."""

from __future__ import annotations

import numpy as np

from pipeline_steps.audio.resample import resample


def test_a_tone_keeps_its_frequency() -> None:
    samples = np.sin(2 * np.pi * 1000 * np.arange(48_000) / 48_000).astype(np.float32)
    out = resample(samples, 48_000, 16_000)
    assert out.dtype == np.float32
    assert len(out) == 16_000
    assert np.abs(np.fft.rfft(out)).argmax() == 1000
    assert np.abs(out[2000:-2000]).max() > 0.99


def test_what_lies_above_the_new_nyquist_is_removed() -> None:
    samples = np.sin(2 * np.pi * 12_000 * np.arange(48_000) / 48_000).astype(np.float32)
    assert np.abs(resample(samples, 48_000, 16_000)[2000:-2000]).max() < 1e-3


def test_equal_rates_and_empty() -> None:
    samples = np.arange(5, dtype=np.float32)
    assert resample(samples, 48_000, 48_000) is samples
    assert len(resample(np.zeros(0, np.float32), 48_000, 16_000)) == 0
