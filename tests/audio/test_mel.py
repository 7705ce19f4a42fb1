"""Mel matrices and frames."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline_steps.audio.mel import aisfx_log_mel, aisfx_mel_matrix, power_frames, yamnet_log_mel, yamnet_mel_matrix


def tone(frequency: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate).astype(np.float32)


def test_yamnet_bands() -> None:
    matrix = yamnet_mel_matrix()
    assert matrix.shape == (257, 64)
    assert (matrix[0] == 0).all()
    assert matrix.min() >= 0
    assert matrix.max() <= 1
    assert (np.diff(matrix.argmax(0)) >= 0).all()


def test_aisfx_bands_sum_to_one() -> None:
    matrix = aisfx_mel_matrix()
    assert matrix.shape == (1025, 96)
    sums = matrix.sum(0)
    assert np.isclose(sums[sums > 0], 1.0).all()


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 4000.0])
def test_a_tone_peaks_in_its_band(frequency: float) -> None:
    yamnet = yamnet_log_mel(tone(frequency, 16_000))
    band = yamnet_mel_matrix()[round(frequency / 8000 * 256)].argmax()
    assert abs(int(yamnet.mean(0).argmax()) - int(band)) <= 1
    aisfx = aisfx_log_mel(tone(frequency, 44_100))
    band = aisfx_mel_matrix()[round(frequency / 22_050 * 1024)].argmax()
    assert abs(int(aisfx.mean(0).argmax()) - int(band)) <= 1


def test_frame_counts_and_floor() -> None:
    assert yamnet_log_mel(np.zeros(15_600, np.float32)).shape == (96, 64)
    assert np.allclose(yamnet_log_mel(np.zeros(400, np.float32)), np.log(0.001))
    assert aisfx_log_mel(np.zeros(0, np.float32)).shape == (1, 96)
    assert aisfx_log_mel(np.zeros(44_100, np.float32)).shape == (44, 96)
    assert (aisfx_log_mel(np.zeros(44_100, np.float32)) == 0).all()


def test_power_frames_obey_parseval() -> None:
    samples = np.random.default_rng(0).normal(size=64).astype(np.float32)
    power = power_frames(samples, window=64, hop=64, fft=64, power=2.0)[0]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(64) / 64)
    total = 2 * power.sum() - power[0] - power[-1]
    assert total == pytest.approx(64 * ((samples * window) ** 2).sum(), rel=1e-6)
