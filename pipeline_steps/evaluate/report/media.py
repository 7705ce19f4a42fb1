"""Pictures, spectrograms and sounds as the small files the report shows: same content, same bytes."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

from pipeline_steps.audio.mel import power_frames
from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import ByteArray, FloatArray

PLAY_RATE = 24_000
"""Hz of the report's sounds."""

SPECTROGRAM = (240, 80)
"""Width and height of a spectrogram in pixels."""

_MEL_BANDS = 80
_DYNAMIC_DB = 70.0
# Nine anchors of a perceptually even dark-to-bright map (violet - red - yellow), interpolated below.
_ANCHORS = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97), (254, 194, 135),
     (252, 253, 191)],
    np.float64,
)  # fmt: skip


def mp3(samples_48k: FloatArray) -> bytes:
    """Mono MP3 at 24 kHz of a mono 48 kHz sound. MP3 because every browser plays it, and because the bytes are a function
    of the samples (an Ogg stream carries a random serial number)."""
    quiet = resample(np.asarray(samples_48k, np.float32), 48_000, PLAY_RATE)
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(quiet, -1.0, 1.0), PLAY_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return stream.getvalue()


@lru_cache(maxsize=1)
def _mel_matrix() -> npt.NDArray[np.float64]:
    """[513, 80] triangles in mel between 40 Hz and 12 kHz for a 1024-point spectrum at 24 kHz."""
    bins = 1127.0 * np.log1p(np.linspace(0, PLAY_RATE / 2, 513) / 700.0)[:, None]
    edges = np.linspace(1127.0 * np.log1p(40 / 700.0), 1127.0 * np.log1p(PLAY_RATE / 2 / 700.0), _MEL_BANDS + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    return np.asarray(np.maximum(0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))))


def spectrogram(samples_48k: FloatArray) -> ByteArray:
    """Mel spectrogram of a mono 48 kHz sound as RGB uint8 [80, 240, 3]: time to the right, 40 Hz - 12 kHz upwards,
    brightness over 70 dB below the sound's own loudest cell."""
    sound = resample(np.asarray(samples_48k, np.float32), 48_000, PLAY_RATE)
    if len(sound) < 2048:
        sound = np.pad(sound, (0, 2048 - len(sound)))
    hop = max(64, (len(sound) - 1024) // SPECTROGRAM[0])
    power = power_frames(sound, window=1024, hop=hop, fft=1024, power=2.0) @ _mel_matrix()
    decibel = 10.0 * np.log10(power + 1e-12)
    level = np.clip((decibel - decibel.max()) / _DYNAMIC_DB + 1.0, 0.0, 1.0).T[::-1]
    grey = Image.fromarray(np.round(255 * level).astype(np.uint8)).resize(SPECTROGRAM, Image.Resampling.BILINEAR)
    return np.asarray(_colour_map()[np.asarray(grey)])


@lru_cache(maxsize=1)
def _colour_map() -> ByteArray:
    place = np.linspace(0, len(_ANCHORS) - 1, 256)
    channels = [np.interp(place, np.arange(len(_ANCHORS)), _ANCHORS[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)


def png(picture: ByteArray, palette: bool = False) -> bytes:
    """RGB uint8 [H, W, 3] as PNG without metadata; `palette` reduces it to 64 colours (for spectrograms)."""
    image = Image.fromarray(picture)
    if palette:
        image = image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def thumbnail(picture: ByteArray, side: int) -> bytes:
    """RGB uint8 [H, W, 3] fitted into `side` x `side` pixels (never enlarged), as JPEG without metadata."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85, optimize=True)
    return stream.getvalue()


def strip(pictures: ByteArray) -> ByteArray:
    """Pictures [S, H, W, 3] side by side with 2 px of white between: [H, S * W + 2 (S - 1), 3]."""
    samples, height, width, _ = pictures.shape
    sheet = np.full((height, samples * width + 2 * (samples - 1), 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        sheet[:, number * (width + 2) : number * (width + 2) + width] = picture
    return sheet
