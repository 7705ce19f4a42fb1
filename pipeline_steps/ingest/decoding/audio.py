"""Audio file to its normal form: mono, 48 kHz, 16-bit FLAC. Files are read in blocks to bound memory."""

from __future__ import annotations

import io
import math
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from pipeline_steps.audio.loudness import full_scale_level, integrated_loudness, needs_tiling, peak_dbfs, silence_ratio
from pipeline_steps.core.array_types import DoubleArray, FloatArray
from pipeline_steps.ingest.decoding.truncation import find_truncation
from pipeline_steps.ingest.reason_codes import RejectedItemError

SAMPLE_RATE = 48_000
"""Hz of the normal form, equal to `core.media_shards.SAMPLE_RATE`; a worker must not import Arrow."""

FORMATS = {"WAV": {"WAV", "WAVEX"}, "FLAC": {"FLAC"}, "OGG": {"OGG"}, "MP3": {"MP3"}, "AIFF": {"AIFF"}}
"""Allowed format by signature -> formats that libsndfile may report for it."""

BLOCK_VALUES = 1 << 17
"""Samples x channels per block."""

RATES = (1000, 768_000)
"""Hz; a rate outside means a damaged header."""

CLIPPING_THRESHOLD = 0.2
"""Clipping ratio above which an item gets the code CLIPPED."""

ANTIPHASE_DB = -30.0
"""Level of the mono mix relative to the mean channel below which the channels cancel."""


class AudioLimits(NamedTuple):
    """Parameters of `ingest.audio` in the form that is sent to a worker."""

    min_seconds: float
    max_seconds: float
    min_lufs: float


class DecodedAudio(NamedTuple):
    """Decoded file: mono [T] at the file's rate, and statistics over all samples."""

    mono: FloatArray
    clipping_ratio: float
    peak: float
    channel_power: DoubleArray


def normalize_audio(handle: BinaryIO, form: str, limits: AudioLimits) -> dict[str, Any]:
    """Decode one audio file.

    Args:
        handle: the open raw file, positioned at 0.
        form: format by signature.
        limits: in seconds and LUFS.

    Returns:
        payload (FLAC bytes), format, sample_rate and channels (of the original), duration_s, lufs, peak_dbfs,
        silence_ratio, clipping_ratio, normalizations.

    Raises:
        RejectedItemError: with one of the AUD codes.
    """
    truncation = find_truncation(handle, form)
    if truncation:
        code = "AUD_HEADER_LIES" if truncation.impossible_header else "AUD_TRUNCATED"
        raise RejectedItemError(code, f"{form}: {truncation.reason}")
    normalizations: set[str] = set()
    try:
        with soundfile.SoundFile(handle) as file:
            if file.format not in FORMATS[form]:
                raise RejectedItemError("AUD_CORRUPT", f"signature of {form}, opened as {file.format}")
            name = f"OGG/{file.subtype.title()}" if form == "OGG" else form
            rate, channels = file.samplerate, file.channels
            if not RATES[0] <= rate <= RATES[1]:
                raise RejectedItemError("AUD_CORRUPT", f"sample rate {rate} Hz is outside {RATES[0]}..{RATES[1]}")
            declared = file.frames
            has_length = 0 <= declared < 1 << 62
            if has_length and declared > limits.max_seconds * rate:
                raise RejectedItemError("AUD_TOO_LONG", f"{declared / rate:.1f} s, limit {limits.max_seconds:g} s")
            decoded = _read(file, limits)
            if channels > 1:
                normalizations.add("DOWNMIX")
                decoded = _fix_antiphase(file, decoded, limits, normalizations)
    except soundfile.LibsndfileError as error:
        raise RejectedItemError("AUD_CORRUPT", f"{form}: {error.error_string}") from error
    frames = len(decoded.mono)
    if not frames:
        raise RejectedItemError("AUD_EMPTY", f"{form}: no samples")
    if has_length and frames < declared:
        raise RejectedItemError("AUD_TRUNCATED", f"{form}: the header declares {declared} samples, {frames} are present")
    if frames < limits.min_seconds * rate:
        raise RejectedItemError("AUD_TOO_SHORT", f"{frames / rate:.3f} s, limit {limits.min_seconds:g} s")
    mono = decoded.mono if rate == SAMPLE_RATE else soxr.resample(decoded.mono, rate, SAMPLE_RATE, quality="HQ")
    if decoded.clipping_ratio > CLIPPING_THRESHOLD:
        normalizations.add("CLIPPED")
    return {
        "format": name,
        "sample_rate": rate,
        "channels": channels,
        "clipping_ratio": decoded.clipping_ratio,
        **_measure(mono, limits, normalizations),
        "normalizations": sorted(normalizations),
    }


def _read(file: soundfile.SoundFile, limits: AudioLimits, channel: int | None = None) -> DecodedAudio:
    """Read a file in blocks; mono is the mean of all channels, or one `channel`."""
    file.seek(0)
    block_frames = max(256, BLOCK_VALUES // file.channels)
    max_frames = math.ceil(limits.max_seconds * file.samplerate)
    ceiling = full_scale_level(file.subtype)
    parts: list[FloatArray] = []
    frames = clipped = 0
    peak = 0.0
    power = np.zeros(file.channels)
    while len(block := file.read(block_frames, dtype="float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise RejectedItemError("AUD_NONFINITE", f"NaN or infinite samples within {frames}..{frames + len(block)}")
        frames += len(block)
        if frames > max_frames:
            raise RejectedItemError("AUD_TOO_LONG", f"more than {limits.max_seconds:g} s")
        magnitude = np.abs(block)
        clipped += int(np.count_nonzero(magnitude >= ceiling))
        peak = max(peak, float(magnitude.max()))
        power += np.square(block, dtype=np.float64).sum(axis=0)
        parts.append(block[:, channel] if channel is not None else block.mean(axis=1, dtype=np.float64).astype(np.float32))
    mono = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return DecodedAudio(mono, clipped / (frames * file.channels) if frames else 0.0, peak, power)


def _fix_antiphase(
    file: soundfile.SoundFile, decoded: DecodedAudio, limits: AudioLimits, normalizations: set[str]
) -> DecodedAudio:
    """Use the loudest channel instead of the mean if the channels cancel each other."""
    mean_power = float(decoded.channel_power.mean())
    mix_power = float(np.square(decoded.mono, dtype=np.float64).sum())
    if mean_power <= 0 or mix_power > mean_power * 10 ** (ANTIPHASE_DB / 10):
        return decoded
    normalizations.add("ANTIPHASE")
    return _read(file, limits, int(np.argmax(decoded.channel_power)))


def _measure(mono: FloatArray, limits: AudioLimits, normalizations: set[str]) -> dict[str, Any]:
    """Scale, measure and encode mono samples at 48 kHz."""
    peak = float(np.abs(mono).max())
    if not math.isfinite(peak):
        raise RejectedItemError("AUD_NONFINITE", "samples overflow when mixed or resampled")
    top = 1.0 - 2.0**-15  # the largest code of 16-bit samples
    if peak > top:
        # A peak up to full scale is no normalization. Decoded MP3 and Ogg, resampled and float samples may exceed it.
        if peak > 1.0:
            normalizations.add("PEAK_GUARD")
        mono = mono * np.float32(top / peak)
    loudness = integrated_loudness(mono, SAMPLE_RATE)
    if loudness <= limits.min_lufs:
        level = f"{loudness:.1f} LUFS" if math.isfinite(loudness) else "below the -70 LUFS gate"
        raise RejectedItemError("AUD_SILENT", f"{level}, limit {limits.min_lufs:g} LUFS; never amplified")
    if needs_tiling(len(mono), SAMPLE_RATE):
        normalizations.add("LOUDNESS_TILED")
    samples = np.rint(mono.astype(np.float64) * 32768.0).clip(-32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return {
        "payload": buffer.getvalue(),
        "duration_s": len(samples) / SAMPLE_RATE,
        "lufs": loudness,
        "peak_dbfs": peak_dbfs(mono),
        "silence_ratio": silence_ratio(mono, SAMPLE_RATE),
    }
