"""Audio file to its normal form: mono, 48 kHz, 16-bit FLAC."""

from __future__ import annotations

import io
import math
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr

from pipeline_steps.audio.loudness import integrated_loudness, needs_tiling, peak_dbfs, silence_ratio
from pipeline_steps.core.array_types import DoubleArray, FloatArray
from pipeline_steps.ingest.decoding.audio_streams import AudioStream, decoder_errors, open_streams
from pipeline_steps.ingest.reason_codes import RejectedItemError

SAMPLE_RATE = 48_000
"""Hz of the normal form, equal to `core.media_shards.SAMPLE_RATE`; a worker must not import Arrow."""

BLOCK_VALUES = 1 << 17
"""Samples x channels per block."""

RATES = (1000, 768_000)
"""Hz; a rate outside means a damaged header."""

CLIPPING_THRESHOLD = 0.2
"""Clipping ratio above which an item gets the code CLIPPED."""

ANTIPHASE_DB = -30.0
"""Level of the mono mix relative to the mean channel below which the channels cancel."""

OFFSET_EDGE_SECONDS = 0.05
"""Start and end that are left out when a sound is tested for a constant offset: a codec distorts the steps there."""


class AudioLimits(NamedTuple):
    """Parameters of `ingest.audio` in the form that is sent to a worker."""

    min_seconds: float
    max_seconds: float
    min_lufs: float


class DecodedAudio(NamedTuple):
    """Decoded stream: mono [T] at the stream's rate, and statistics over all samples."""

    mono: FloatArray
    rate: int
    channels: int
    clipped: int
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
        RejectedItemError: with one of the AUD codes, or FORMAT_NOT_ALLOWED for a coding that no decoder reads.
    """
    normalizations: set[str] = set()
    with decoder_errors(form):
        streams = open_streams(handle, form, limits.max_seconds, normalizations)
        parts = _decode(streams, form, limits, normalizations)
    mono, rate = _join(parts)
    if not len(mono):
        raise RejectedItemError("AUD_EMPTY", f"{form}: no samples")
    if len(mono) < limits.min_seconds * rate:
        raise RejectedItemError("AUD_TOO_SHORT", f"{len(mono) / rate:.3f} s, limit {limits.min_seconds:g} s")
    if _is_constant_offset(mono, rate, limits.min_lufs):
        raise RejectedItemError("AUD_SILENT", f"a constant offset of {float(mono.mean()):.3f} and no signal; never amplified")
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    values = sum(len(part.mono) * part.channels for part in parts)
    clipping_ratio = sum(part.clipped for part in parts) / values
    if clipping_ratio > CLIPPING_THRESHOLD:
        normalizations.add("CLIPPED")
    return {
        "format": streams[0].name,
        "sample_rate": parts[0].rate,
        "channels": parts[0].channels,
        "clipping_ratio": clipping_ratio,
        **_measure(mono, limits, normalizations),
        "normalizations": sorted(normalizations),
    }


def _decode(streams: list[AudioStream], form: str, limits: AudioLimits, normalizations: set[str]) -> list[DecodedAudio]:
    """Decode streams that play one after the other."""
    parts: list[DecodedAudio] = []
    for stream in streams:
        if not RATES[0] <= stream.rate <= RATES[1]:
            raise RejectedItemError("AUD_CORRUPT", f"sample rate {stream.rate} Hz is outside {RATES[0]}..{RATES[1]}")
        seconds_left = limits.max_seconds - sum(len(part.mono) / part.rate for part in parts)
        if stream.declared is not None and stream.declared > seconds_left * stream.rate:
            raise RejectedItemError("AUD_TOO_LONG", f"{stream.declared / stream.rate:.1f} s, limit {limits.max_seconds:g} s")
        part = _read(stream, seconds_left, limits)
        if stream.channels > 1:
            normalizations.add("DOWNMIX")
            part = _fix_antiphase(stream, part, seconds_left, limits, normalizations)
        if stream.declared is not None and 0 < len(part.mono) < stream.declared:
            reason = f"the header declares {stream.declared} samples, {len(part.mono)} are present"
            raise RejectedItemError("AUD_TRUNCATED", f"{form}: {reason}")
        parts.append(part)
    return parts


def _read(stream: AudioStream, max_seconds: float, limits: AudioLimits, channel: int | None = None) -> DecodedAudio:
    """Decode a stream in blocks; mono is the mean of all channels, or one `channel`."""
    max_frames = math.ceil(max_seconds * stream.rate)
    parts: list[FloatArray] = []
    frames = clipped = 0
    peak = 0.0
    power = np.zeros(stream.channels)
    for block in stream.blocks(max(256, BLOCK_VALUES // stream.channels)):
        if not np.isfinite(block).all():
            raise RejectedItemError("AUD_NONFINITE", f"NaN or infinite samples within {frames}..{frames + len(block)}")
        frames += len(block)
        if frames > max_frames:
            raise RejectedItemError("AUD_TOO_LONG", f"more than {limits.max_seconds:g} s")
        magnitude = np.abs(block)
        clipped += int(np.count_nonzero(magnitude >= stream.full_scale))
        peak = max(peak, float(magnitude.max()))
        power += np.square(block, dtype=np.float64).sum(axis=0)
        parts.append(block[:, channel] if channel is not None else block.mean(axis=1, dtype=np.float64).astype(np.float32))
    mono = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return DecodedAudio(mono, stream.rate, stream.channels, clipped, peak, power)


def _fix_antiphase(
    stream: AudioStream, decoded: DecodedAudio, max_seconds: float, limits: AudioLimits, normalizations: set[str]
) -> DecodedAudio:
    """Use the loudest channel instead of the mean if the channels cancel each other."""
    mean_power = float(decoded.channel_power.mean())
    mix_power = float(np.square(decoded.mono, dtype=np.float64).sum())
    if mean_power <= 0 or mix_power > mean_power * 10 ** (ANTIPHASE_DB / 10):
        return decoded
    normalizations.add("ANTIPHASE")
    return _read(stream, max_seconds, limits, int(np.argmax(decoded.channel_power)))


def _join(parts: list[DecodedAudio]) -> tuple[FloatArray, int]:
    """Mono samples of all parts and their rate; parts of different rates are resampled first."""
    if len({part.rate for part in parts}) == 1:
        return np.concatenate([part.mono for part in parts]), parts[0].rate
    resampled = [
        part.mono if part.rate == SAMPLE_RATE else soxr.resample(part.mono, part.rate, SAMPLE_RATE, quality="HQ")
        for part in parts
    ]
    return np.concatenate(resampled), SAMPLE_RATE


def _is_constant_offset(mono: FloatArray, rate: int, min_lufs: float) -> bool:
    """Whether the samples are a constant offset: its steps at start and end are no signal, and resampling would ring there."""
    edge = min(round(OFFSET_EDGE_SECONDS * rate), len(mono) // 4)
    inner = mono[edge : len(mono) - edge].astype(np.float64)
    offset = float(inner.mean())
    return abs(offset) > 0 and float(np.abs(inner - offset).max()) <= abs(offset) * 10 ** (min_lufs / 20)


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
