from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from pipeline_steps.core import media_shards
from pipeline_steps.ingest.decoding import audio
from pipeline_steps.ingest.decoding.audio import AudioLimits, normalize_audio
from pipeline_steps.ingest.reason_codes import RejectedItemError

LIMITS = AudioLimits(min_seconds=0.1, max_seconds=10, min_lufs=-70)


def sine(seconds: float, rate: int, frequency: float, gain: float = 0.5) -> np.ndarray:
    return gain * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def decoded(
    samples: np.ndarray, rate: int = 48_000, form: str = "WAV", subtype: str = "FLOAT", **changes: float
) -> tuple[dict, np.ndarray]:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=form, subtype=subtype)
    buffer.seek(0)
    row = normalize_audio(buffer, form, LIMITS._replace(**changes))
    stored, stored_rate = soundfile.read(io.BytesIO(row["payload"]))
    assert stored_rate == media_shards.SAMPLE_RATE == audio.SAMPLE_RATE
    assert stored.ndim == 1
    return row, stored


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 96_000, 192_000])
def test_resampling_keeps_the_frequency(rate: int) -> None:
    row, stored = decoded(sine(2, rate, 1000), rate)
    assert row["sample_rate"] == rate
    assert row["duration_s"] == pytest.approx(2, abs=1e-3)
    window = stored[4800:-4800] * np.hanning(len(stored) - 9600)
    spectrum = np.abs(np.fft.rfft(window, 1 << 20))
    assert np.argmax(spectrum) * 48_000 / (1 << 20) == pytest.approx(1000, rel=1e-3)


@pytest.mark.parametrize("frequency", [25_000, 30_000, 40_000, 60_000, 90_000])
def test_no_alias_above_minus_80_db(frequency: float) -> None:
    """Frequencies above the band must be removed; a weak in-band tone keeps the clip from being silent."""
    rate = 192_000
    mixture = sine(1, rate, frequency, 0.5) + sine(1, rate, 1000, 0.05)
    _, stored = decoded(mixture, rate)
    inner = stored[4800:-4800]
    spectrum = np.abs(np.fft.rfft(inner * np.blackman(len(inner)))) / (0.42 * len(inner) / 2)
    axis = np.fft.rfftfreq(len(inner), 1 / 48_000)
    rest = spectrum[(np.abs(axis - 1000) > 50) & (axis < 23_000)]
    assert 20 * np.log10(rest.max() / 0.5) < -80


def test_mono_is_the_mean_of_all_channels() -> None:
    left, right = sine(1, 48_000, 300, 0.6), sine(1, 48_000, 500, 0.2)
    row, stored = decoded(np.stack([left, right], 1))
    assert np.abs(stored - (left + right) / 2).max() < 2**-15
    assert row["normalizations"] == ["DOWNMIX"]
    assert row["channels"] == 2


def test_loudest_channel_replaces_a_cancelled_mix() -> None:
    wave = sine(1, 48_000, 300, 0.5)
    row, stored = decoded(np.stack([0.9 * wave, wave, -wave, -0.9 * wave], 1))
    assert row["normalizations"] == ["ANTIPHASE", "DOWNMIX"]
    assert np.abs(stored - wave).max() < 2**-15


def test_peak_guard() -> None:
    row, stored = decoded(sine(1, 48_000, 300, 4.0))
    assert "PEAK_GUARD" in row["normalizations"]
    assert np.abs(stored - sine(1, 48_000, 300, 1.0)).max() < 2**-14
    assert row["peak_dbfs"] == pytest.approx(0, abs=0.01)


def test_quiet_audio_is_not_amplified() -> None:
    row, stored = decoded(sine(2, 48_000, 1000, 0.01))
    assert np.abs(stored).max() == pytest.approx(0.01, rel=0.01)
    assert row["lufs"] == pytest.approx(-43, abs=0.3)
    assert row["peak_dbfs"] == pytest.approx(-40, abs=0.1)


def test_measurements() -> None:
    wave = np.concatenate([sine(1, 48_000, 1000, 3.0).clip(-1, 1), np.zeros(48_000)])
    row, _ = decoded(wave, subtype="PCM_16")
    assert row["clipping_ratio"] == pytest.approx(0.39, abs=0.03)
    assert row["silence_ratio"] == pytest.approx(0.5, abs=0.01)
    assert "CLIPPED" in row["normalizations"]
    assert row["duration_s"] == 2.0


def test_output_is_deterministic() -> None:
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 30_000)
    assert decoded(samples, 44_100)[0] == decoded(samples, 44_100)[0]


@pytest.mark.parametrize(
    ("samples", "code"),
    [
        (np.zeros(0), "AUD_EMPTY"),
        (sine(0.09, 48_000, 500), "AUD_TOO_SHORT"),
        (sine(10.1, 48_000, 500), "AUD_TOO_LONG"),
        (np.full(48_000, 0.4), "AUD_SILENT"),
        (np.append(sine(1, 48_000, 500), np.nan), "AUD_NONFINITE"),
    ],
)
def test_limits(samples: np.ndarray, code: str) -> None:
    with pytest.raises(RejectedItemError) as error:
        decoded(samples)
    assert error.value.code == code


def test_min_lufs() -> None:
    with pytest.raises(RejectedItemError, match="limit -40 LUFS"):
        decoded(sine(1, 48_000, 1000, 0.01), min_lufs=-40)


def test_golden_output() -> None:
    """Raise decode.VERSION when this changes; otherwise the cache returns the old form."""
    from pipeline_steps.ingest.decoding.decode import VERSION

    row, stored = decoded(np.stack([sine(1, 44_100, 440), sine(1, 44_100, 660, 0.3)], 1), 44_100, subtype="PCM_16")
    numbers = (VERSION, len(stored), round(row["lufs"], 3), round(row["peak_dbfs"], 3))
    assert numbers == (2, 48_000, GOLDEN_LUFS, GOLDEN_PEAK)
    assert float(np.abs(stored).sum()) == pytest.approx(GOLDEN_SUM, rel=1e-6)


GOLDEN_LUFS = -14.401
GOLDEN_PEAK = -8.391
GOLDEN_SUM = 8215.400939941406
