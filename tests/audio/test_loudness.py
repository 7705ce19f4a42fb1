from __future__ import annotations

import math

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.audio.loudness import full_scale_level, integrated_loudness, needs_tiling, peak_dbfs, silence_ratio

RATE = 48_000


def sine(seconds: float, gain: float, frequency: float = 997.0) -> np.ndarray:
    return gain * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


def test_calibration_of_the_standard() -> None:
    """BS.1770-4, note in section 2: a 997 Hz sine at 0 dBFS in one front channel reads -3.01 LKFS."""
    assert integrated_loudness(sine(5, 1.0), RATE) == pytest.approx(-3.01, abs=0.05)
    assert integrated_loudness(sine(5, 0.1), RATE) == pytest.approx(-23.01, abs=0.05)


def test_short_sounds_are_measured_on_repetitions() -> None:
    assert needs_tiling(round(0.25 * RATE), RATE)
    assert not needs_tiling(RATE, RATE)
    assert integrated_loudness(sine(0.25, 0.5), RATE) == pytest.approx(integrated_loudness(sine(4, 0.5), RATE), abs=0.5)
    assert math.isfinite(integrated_loudness(sine(0.01, 0.5), RATE))


def test_silence_and_offset_have_no_loudness() -> None:
    assert integrated_loudness(np.zeros(RATE), RATE) == -math.inf
    assert integrated_loudness(np.full(RATE, 0.7, np.float32), RATE) == -math.inf
    assert integrated_loudness(sine(2, 0.1) + 0.3, RATE) == pytest.approx(integrated_loudness(sine(2, 0.1), RATE), abs=0.1)


@pytest.mark.parametrize("bad", [np.zeros((10, 2)), np.zeros(0), np.array([0.1, np.nan]), np.array([np.inf])])
def test_what_cannot_be_measured_raises(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="samples"):
        integrated_loudness(bad, RATE)


def test_silence_share_counts_frames() -> None:
    half = np.concatenate([sine(1, 0.5), np.zeros(RATE)])
    assert silence_ratio(half, RATE) == pytest.approx(0.5, abs=0.02)
    assert silence_ratio(np.zeros(100), RATE) == 1.0
    assert silence_ratio(sine(1, 0.5), RATE) == 0.0


@given(st.integers(1, 3000), st.floats(0, 1))
def test_silence_share_is_a_share(length: int, gain: float) -> None:
    assert 0.0 <= silence_ratio(np.full(length, gain), 8000) <= 1.0


def test_peak() -> None:
    assert peak_dbfs(np.array([0.5, -1.0])) == 0.0
    assert peak_dbfs(np.zeros(3)) == -math.inf


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "ULAW", "ALAW", "FLOAT"])
def test_full_scale_is_what_the_largest_sample_decodes_to(subtype: str, tmp_path) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, np.array([1.0, -1.0, 0.5, 0.0]), RATE, subtype=subtype)
    samples, _ = soundfile.read(path, dtype="float32")
    assert (np.abs(samples) >= full_scale_level(subtype)).tolist() == [True, True, False, False]
