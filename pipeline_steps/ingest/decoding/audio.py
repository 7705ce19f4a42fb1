"""A sound file -> its normal form: mono, 48 kHz, 16-bit FLAC; read in blocks, so that its length costs no memory."""

from __future__ import annotations

import io
import math
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from pipeline_steps.audio.loudness import full_scale_level, integrated_loudness, needs_tiling, peak_dbfs, silence_ratio
from pipeline_steps.ingest.decoding.truncation import find_truncation
from pipeline_steps.ingest.reason_codes import RejectedItemError

SAMPLE_RATE = 48_000
"""Hz of the normal form: `core.media.SAMPLE_RATE`, repeated because a decoding process does not load Arrow."""

FORMATS = {"WAV": {"WAV", "WAVEX"}, "FLAC": {"FLAC"}, "OGG": {"OGG"}, "MP3": {"MP3"}, "AIFF": {"AIFF"}}
"""Allowed format by signature -> what libsndfile may then call it."""

BLOCK_VALUES = 1 << 17
"""Samples x channels read at a time."""

RATES = (1000, 768_000)
"""Hz; rates outside are taken for damage."""

CLIPPED_FLAG = 0.2
ANTIPHASE_DB = -30.0
"""Mono mix this far below the mean channel: the channels cancel."""


class AudioLimits(NamedTuple):
    """The `ingest.sound` parameters, plain so that they travel to a child process."""

    min_seconds: float
    max_seconds: float
    silence_lufs: float


class DecodedAudio(NamedTuple):
    """A file read to its end: mono float32 [T] at the file's rate and what was counted on the way."""

    mono: npt.NDArray[np.float32]
    clipping_ratio: float
    peak: float
    channel_power: npt.NDArray[np.float64]


def normalise_sound(handle: BinaryIO, form: str, limits: AudioLimits) -> dict[str, Any]:
    """Decode one sound.

    Args:
        handle: the open raw file, positioned at 0.
        form: format by signature.
        limits: bounds in seconds and LUFS.

    Returns:
        payload (FLAC bytes), format, sample_rate and channels (of the original), seconds, lufs, peak_dbfs,
        silence_ratio, clipping_ratio, repaired.

    Raises:
        RejectedError: with one of the AUD codes.
    """
    missing = find_truncation(handle, form)
    if missing:
        raise RejectedItemError("AUD_HEADER_LIES" if missing.lies else "AUD_TRUNCATED", f"{form}: {missing.text}")
    repaired: set[str] = set()
    try:
        with soundfile.SoundFile(handle) as sound:
            if sound.format not in FORMATS[form]:
                raise RejectedItemError("AUD_CORRUPT", f"looks like {form}, opens as {sound.format}")
            name = f"OGG/{sound.subtype.title()}" if form == "OGG" else form
            rate, channels = sound.samplerate, sound.channels
            if not RATES[0] <= rate <= RATES[1]:
                raise RejectedItemError("AUD_CORRUPT", f"sample rate {rate} Hz is outside {RATES[0]}..{RATES[1]}")
            declared = sound.frames
            known = 0 <= declared < 1 << 62
            if known and declared > limits.max_seconds * rate:
                raise RejectedItemError("AUD_TOO_LONG", f"{declared / rate:.1f} s, limit {limits.max_seconds:g} s")
            reading = _read(sound, limits)
            if channels > 1:
                repaired.add("DOWNMIX")
                reading = _fix_antiphase(sound, reading, limits, repaired)
    except soundfile.LibsndfileError as error:
        raise RejectedItemError("AUD_CORRUPT", f"{form}: {error.error_string}") from error
    frames = len(reading.mono)
    if not frames:
        raise RejectedItemError("AUD_EMPTY", f"{form}: no samples")
    if known and frames < declared:
        raise RejectedItemError("AUD_TRUNCATED", f"{form}: the header declares {declared} samples, {frames} are there")
    if frames < limits.min_seconds * rate:
        raise RejectedItemError("AUD_TOO_SHORT", f"{frames / rate:.3f} s, limit {limits.min_seconds:g} s")
    mono = reading.mono if rate == SAMPLE_RATE else soxr.resample(reading.mono, rate, SAMPLE_RATE, quality="HQ")
    return _measure(mono, name, rate, channels, reading, limits, repaired)


def _read(sound: soundfile.SoundFile, limits: AudioLimits, channel: int | None = None) -> DecodedAudio:
    """Read to the end in blocks; the mix is the mean of all channels, or `channel` alone."""
    sound.seek(0)
    block_frames = max(256, BLOCK_VALUES // sound.channels)
    most = math.ceil(limits.max_seconds * sound.samplerate)
    ceiling = full_scale_level(sound.subtype)
    parts: list[npt.NDArray[np.float32]] = []
    frames = clipped = 0
    peak = 0.0
    power = np.zeros(sound.channels)
    while len(block := sound.read(block_frames, dtype="float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise RejectedItemError("AUD_NONFINITE", f"NaN or infinite samples within {frames}..{frames + len(block)}")
        frames += len(block)
        if frames > most:
            raise RejectedItemError("AUD_TOO_LONG", f"more than {limits.max_seconds:g} s")
        magnitude = np.abs(block)
        clipped += int(np.count_nonzero(magnitude >= ceiling))
        peak = max(peak, float(magnitude.max()))
        power += np.square(block, dtype=np.float64).sum(axis=0)
        parts.append(block[:, channel] if channel is not None else block.mean(axis=1, dtype=np.float64).astype(np.float32))
    mono = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return DecodedAudio(mono, clipped / (frames * sound.channels) if frames else 0.0, peak, power)


def _fix_antiphase(sound: soundfile.SoundFile, reading: DecodedAudio, limits: AudioLimits, repaired: set[str]) -> DecodedAudio:
    """Where the mean of the channels nearly vanishes though they are not silent, take the loudest channel instead."""
    mean_power = float(reading.channel_power.mean())
    mix_power = float(np.square(reading.mono, dtype=np.float64).sum())
    if mean_power <= 0 or mix_power > mean_power * 10 ** (ANTIPHASE_DB / 10):
        return reading
    repaired.add("ANTIPHASE")
    return _read(sound, limits, int(np.argmax(reading.channel_power)))


def _measure(
    mono: npt.NDArray[np.float32],
    form: str,
    rate: int,
    channels: int,
    reading: DecodedAudio,
    limits: AudioLimits,
    repaired: set[str],
) -> dict[str, Any]:
    peak = float(np.abs(mono).max())
    if not math.isfinite(peak):
        raise RejectedItemError("AUD_NONFINITE", "samples overflow when mixed or resampled")
    top = 1.0 - 2.0**-15  # the largest code of 16-bit samples
    if peak > top:
        # Full scale itself is no repair; decoded MP3 and Ogg, resampled and float sounds may go beyond it.
        if peak > 1.0:
            repaired.add("PEAK_GUARD")
        mono = mono * np.float32(top / peak)
    loudness = integrated_loudness(mono, SAMPLE_RATE)
    if loudness <= limits.silence_lufs:
        level = f"{loudness:.1f} LUFS" if math.isfinite(loudness) else "below the -70 LUFS gate"
        raise RejectedItemError("AUD_SILENT", f"{level}, limit {limits.silence_lufs:g} LUFS; never amplified")
    if needs_tiling(len(mono), SAMPLE_RATE):
        repaired.add("LOUDNESS_TILED")
    if reading.clipping_ratio > CLIPPED_FLAG:
        repaired.add("CLIPPED")
    samples = np.rint(mono.astype(np.float64) * 32768.0).clip(-32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return {
        "payload": buffer.getvalue(),
        "format": form,
        "sample_rate": rate,
        "channels": channels,
        "duration_s": len(samples) / SAMPLE_RATE,
        "lufs": loudness,
        "peak_dbfs": peak_dbfs(mono),
        "silence_ratio": silence_ratio(mono, SAMPLE_RATE),
        "clipping_ratio": reading.clipping_ratio,
        "normalizations": sorted(repaired),
    }
