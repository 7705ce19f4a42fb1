"""What one clip conditions recipe `ip_adapter` with: encoder tokens in order of time, tag probabilities, and the level."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline_steps.audio.loudness import integrated_loudness
from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.models.audio.ast import STORED_RATE
from pipeline_steps.models.audio.yamnet import SAMPLE_RATE, YamNet

TOKENS_VERSION = 2
"""Version of the tokens, part of `describe`. Raise it whenever their values change."""
MIN_SECONDS = 2.0
"""Shorter clips are repeated up to this length for YAMNet, which is weak on clips of less than a patch."""
FLOOR_DB = -70.0
"""Loudness assigned to silence."""
REFERENCE_DB = -23.0
"""Loudness that a clip is scaled to before YAMNet, so that tags and tokens do not depend on the level."""
TAGS = 521


@dataclass(frozen=True, slots=True)
class AudioTokens:
    """Encoded clip.

    Attributes:
        grid: float16 [time, bands, width], encoder tokens.
        tags: float32 [521], AudioSet tag probabilities of YAMNet, averaged over its patches.
        loudness: LUFS of the clip, at least -70.
    """

    grid: torch.Tensor
    tags: torch.Tensor
    loudness: float


@dataclass(frozen=True, slots=True)
class TokenPooling:
    """Mean of neighboring tokens, for a smaller grid.

    Attributes:
        time: time steps that become one.
        bands: bands that become one.
    """

    time: int = 1
    bands: int = 1

    def __call__(self, grid: torch.Tensor) -> torch.Tensor:
        """Means [time / time, bands / bands, width] of a float16 grid, rounded up; the last group may have fewer tokens."""
        for axis, size in enumerate((self.time, self.bands)):
            if size > 1:
                groups = torch.split(grid.float(), size, axis)
                grid = torch.cat([group.mean(axis, keepdim=True) for group in groups], axis).half()
        return grid


class AudioTokenizer(ABC):
    """Pretrained encoder of a clip as `AudioTokens`. Tags are YAMNet's whatever the encoder of the grid.

    Args:
        encoder: of the grid.
        tagger: of the tags.
        pooling: of the grid.

    Attributes:
        encoder_bands: tokens per time step before pooling.
        width: width of a token.
        rate: sample rate of prepared waveforms, Hz.
    """

    name: ClassVar[str]
    rate: ClassVar[int]
    encoder_bands: int
    width: int

    def __init__(self, encoder: Any, tagger: YamNet, pooling: TokenPooling = TokenPooling()) -> None:
        self.encoder = encoder
        self.tagger = tagger
        self.pooling = pooling

    @property
    def bands(self) -> int:
        """Tokens per time step."""
        return -(-self.encoder_bands // self.pooling.bands)

    @property
    def families(self) -> frozenset[str]:
        """Model families of the encoder and the tagger."""
        return frozenset({self.encoder.family, self.tagger.family})

    def describe(self) -> dict[str, Any]:
        """Everything except the audio that determines the tokens."""
        pooling = {} if self.pooling == TokenPooling() else {"pooling": asdict(self.pooling)}
        return {**self.encoder.describe(), "grids": TOKENS_VERSION, "tagger": self.tagger.describe(), **pooling}

    @abstractmethod
    def prepare(self, samples_48k: FloatArray, max_seconds: float) -> FloatArray:
        """Waveform [T] at `rate` of the first `max_seconds` of a mono 48 kHz clip; augmentation is applied to it.

        Raises:
            ValueError: the clip is empty, not mono, or not finite.
        """

    def encode(self, waveforms: Sequence[FloatArray]) -> list[AudioTokens]:
        """Tokens of prepared waveforms, pooled."""
        return [replace(tokens, grid=self.pooling(tokens.grid)) for tokens in self._encode(waveforms)]

    @abstractmethod
    def _encode(self, waveforms: Sequence[FloatArray]) -> list[AudioTokens]:
        """Tokens of prepared waveforms before pooling."""

    def tokenize(self, clips: Sequence[FloatArray], max_seconds: float) -> list[AudioTokens]:
        """Tokens of the first `max_seconds` of each mono 48 kHz clip [T].

        Raises:
            ValueError: a clip is empty, not mono, or not finite.
        """
        return self.encode([self.prepare(clip, max_seconds) for clip in clips])

    def tag(self, samples_48k: FloatArray, max_seconds: float) -> tuple[torch.Tensor, float]:
        """Tag probabilities [521] and loudness of the first `max_seconds` of a mono 48 kHz clip [T], as in its tokens."""
        check_waveform(samples_48k)
        return self._tag(to_16k(samples_48k[: math.ceil(max_seconds * STORED_RATE)]))[:2]

    def _tag(self, samples_16k: FloatArray) -> tuple[torch.Tensor, float, torch.Tensor]:
        """Tag probabilities [521], loudness and feature map [time, 1024] of a 16 kHz waveform, at the reference level.

        One clip per call, so that rounding does not depend on a batch.
        """
        self.tagger.load()
        loudness = max(FLOOR_DB, integrated_loudness(samples_16k, SAMPLE_RATE))
        scaled = samples_16k * np.float32(10 ** ((REFERENCE_DB - loudness) / 20) if loudness > FLOOR_DB else 1.0)
        with torch.inference_mode():
            logits, _, feature_map = self.tagger(torch.from_numpy(self.tagger.frames(scaled)))
            frames = feature_map.mean(3).permute(0, 2, 1).reshape(-1, feature_map.shape[1])
        return logits.sigmoid().mean(0).clone(), loudness, frames.clone()


def check_waveform(samples: FloatArray) -> None:
    """Check a clip.

    Raises:
        ValueError: the samples are empty, not one-dimensional, or contain NaN or infinity.
    """
    if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
        raise ValueError(f"expected finite mono samples [T], got shape {samples.shape}")


def to_16k(samples_48k: FloatArray) -> FloatArray:
    """Resample to 16 kHz and repeat the clip up to 2 s."""
    samples = resample(samples_48k, STORED_RATE, SAMPLE_RATE)
    shortest = int(MIN_SECONDS * SAMPLE_RATE)
    return samples if len(samples) >= shortest else np.resize(samples, shortest)


class YamnetTokenizer(AudioTokenizer):
    """Tokens of one band from YAMNet's last feature map, 0.16 s apart. Their square root evens out their range."""

    name = "yamnet"
    rate = SAMPLE_RATE
    encoder_bands, width = 1, 1024

    def prepare(self, samples_48k: FloatArray, max_seconds: float) -> FloatArray:
        check_waveform(samples_48k)
        return to_16k(samples_48k[: math.ceil(max_seconds * STORED_RATE)])

    def _encode(self, waveforms: Sequence[FloatArray]) -> list[AudioTokens]:
        encoded = [self._tag(waveform) for waveform in waveforms]
        return [AudioTokens(frames.sqrt().half()[:, None], tags, loudness) for tags, loudness, frames in encoded]


class AstTokenizer(AudioTokenizer):
    """Tokens of an Audio Spectrogram Transformer: 12 bands, 0.1 s apart."""

    name = "ast"
    rate = STORED_RATE

    @property
    def encoder_bands(self) -> int:  # type: ignore[override]
        """Tokens per time step before pooling."""
        return int(self.encoder.bands)

    @property
    def width(self) -> int:  # type: ignore[override]
        """Width of a token."""
        return int(self.encoder.dimension)

    def prepare(self, samples_48k: FloatArray, max_seconds: float) -> FloatArray:
        check_waveform(samples_48k)
        return samples_48k[: math.ceil(max_seconds * STORED_RATE)]

    def _encode(self, waveforms: Sequence[FloatArray]) -> list[AudioTokens]:
        self.encoder.load()
        grids = self.encoder.grids(list(waveforms))
        tagged = [self._tag(to_16k(waveform)) for waveform in waveforms]
        return [
            AudioTokens(torch.from_numpy(grid).half(), tags, loudness)
            for grid, (tags, loudness, _) in zip(grids, tagged, strict=True)
        ]
