"""Media files of the report: images, spectrograms and audio as small files. The same content gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import soundfile
from PIL import Image

from pipeline_steps.audio.mel import power_frames
from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import ByteArray, DoubleArray, FloatArray

PLAY_RATE = 24_000
"""Sample rate of the audio of the report in Hz."""

SPECTROGRAM = (240, 80)
"""Width and height of a spectrogram in px."""

THUMBNAIL = 224
"""px of the longer side of a real image in the report."""

NUM_THREADS = 4
"""Media files encoded at a time; the encoders release Python's lock."""

_MEL_BANDS = 80
_DYNAMIC_DB = 70.0
# Anchors of a perceptually uniform color map from dark violet through red to yellow; colors between them are interpolated.
_ANCHORS = np.array(
    [(0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97), (254, 194, 135),
     (252, 253, 191)],
    np.float64,
)  # fmt: skip


def mp3(samples_48k: FloatArray) -> bytes:
    """Mono MP3 at 24 kHz of mono 48 kHz audio.

    Every browser plays MP3, and its bytes are a function of the samples. An Ogg stream contains a random serial number.
    """
    resampled = resample(np.asarray(samples_48k, np.float32), 48_000, PLAY_RATE)
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(resampled, -1.0, 1.0), PLAY_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return stream.getvalue()


@lru_cache(maxsize=1)
def _mel_matrix() -> DoubleArray:
    """Triangular mel filters [513, 80] from 40 Hz to 12 kHz for a 1024-point spectrum at 24 kHz."""
    bins = 1127.0 * np.log1p(np.linspace(0, PLAY_RATE / 2, 513) / 700.0)[:, None]
    edges = np.linspace(1127.0 * np.log1p(40 / 700.0), 1127.0 * np.log1p(PLAY_RATE / 2 / 700.0), _MEL_BANDS + 2)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    return np.asarray(np.maximum(0.0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))))


def spectrogram(samples_48k: FloatArray) -> ByteArray:
    """Mel spectrogram of mono 48 kHz audio as RGB uint8 [80, 240, 3].

    Time runs to the right and frequency upwards from 40 Hz to 12 kHz. Brightness covers 70 dB below the loudest cell.
    """
    samples = resample(np.asarray(samples_48k, np.float32), 48_000, PLAY_RATE)
    if len(samples) < 2048:
        samples = np.pad(samples, (0, 2048 - len(samples)))
    hop = max(64, (len(samples) - 1024) // SPECTROGRAM[0])
    power = power_frames(samples, window=1024, hop=hop, fft=1024, power=2.0) @ _mel_matrix()
    decibel = 10.0 * np.log10(power + 1e-12)
    level = np.clip((decibel - decibel.max()) / _DYNAMIC_DB + 1.0, 0.0, 1.0).T[::-1]
    gray = Image.fromarray(np.round(255 * level).astype(np.uint8)).resize(SPECTROGRAM, Image.Resampling.BILINEAR)
    return np.asarray(_color_map()[np.asarray(gray)])


@lru_cache(maxsize=1)
def _color_map() -> ByteArray:
    place = np.linspace(0, len(_ANCHORS) - 1, 256)
    channels = [np.interp(place, np.arange(len(_ANCHORS)), _ANCHORS[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)


def png(image: ByteArray, palette: bool = False) -> bytes:
    """PNG without metadata of RGB uint8 [H, W, 3]; `palette` reduces it to 64 colors, for spectrograms."""
    encoded = Image.fromarray(image)
    if palette:
        encoded = encoded.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    encoded.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def thumbnail(image: ByteArray, side: int) -> bytes:
    """JPEG without metadata of RGB uint8 [H, W, 3], fitted into `side` x `side` px and never enlarged."""
    small = Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85, optimize=True)
    return stream.getvalue()


def strip(images: ByteArray) -> ByteArray:
    """Images [S, H, W, 3] side by side with 2 px of white between them: [H, S * W + 2 (S - 1), 3]."""
    samples, height, width, _ = images.shape
    sheet = np.full((height, samples * width + 2 * (samples - 1), 3), 255, np.uint8)
    for number, image in enumerate(images):
        sheet[:, number * (width + 2) : number * (width + 2) + width] = image
    return sheet


class ReportMedia:
    """Media files that the report shows. Each method registers a file and returns its path relative to the page.

    Args:
        load_image: reads an image by id.
        load_audio: renders audio by the key of a mixture, or by id.
    """

    def __init__(self, load_image: Callable[[str], ByteArray], load_audio: Callable[[str], FloatArray]) -> None:
        self._load_image, self._load_audio = load_image, load_audio
        self._encoders: dict[str, Callable[[], bytes]] = {}

    def image(self, image_id: str) -> str:
        """Thumbnail of a real image."""
        return self._add(f"samples/picture-{image_id}.jpg", lambda: thumbnail(self._load_image(image_id), THUMBNAIL))

    def audio(self, key: str) -> str:
        """MP3 of a clip."""
        return self._add(f"audio/{key}.mp3", lambda: mp3(self._load_audio(key)))

    def clip(self, name: str, samples: FloatArray) -> str:
        """MP3 of audio that is no clip of the catalog."""
        return self._add(f"audio/{name}.mp3", lambda: mp3(samples))

    def spectrogram(self, key: str) -> str:
        """Spectrogram of a clip."""
        return self._add(f"samples/spectrogram-{key}.png", lambda: png(spectrogram(self._load_audio(key)), palette=True))

    def strip(self, key: str, images: ByteArray) -> str:
        """Samples of a clip side by side."""
        return self._add(f"samples/drawn-{key}.png", lambda: png(strip(images)))

    def encode(self) -> dict[str, bytes]:
        """Bytes of every registered file by path."""
        paths = sorted(self._encoders)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return dict(zip(paths, pool.map(lambda path: self._encoders[path](), paths), strict=True))

    def _add(self, path: str, encode: Callable[[], bytes]) -> str:
        self._encoders.setdefault(path, encode)
        return path
