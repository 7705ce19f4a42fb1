"""Audio tokens of recipe `ip_adapter`: encoder outputs as grids [time, bands, width], in order of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.diffusion.audio_features import FEATURE_WIDTH, AudioFeatures, extract_audio_features, preprocess_waveform
from pipeline_steps.models.audio.ast import STORED_RATE, AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet

TOKENS_VERSION = 1
"""Version of the tokens, part of `describe`. Raise it whenever their values change."""


def yamnet_tokens(features: AudioFeatures) -> torch.Tensor:
    """float16 [time, 1, 1024]: square roots of YAMNet's frames, 0.16 s apart. The root evens out their range."""
    return features.frames.float().sqrt().half()[:, None]


class YamnetTokenizer:
    """Tokens of one band from YAMNet's last feature map."""

    name: ClassVar[str] = "yamnet"
    family: ClassVar[str] = YamNet.family
    bands, width = 1, FEATURE_WIDTH

    def __init__(self, encoder: YamNet) -> None:
        self.encoder = encoder

    def describe(self) -> dict[str, Any]:
        """Everything except the audio that determines the tokens."""
        return {**self.encoder.describe(), "grids": TOKENS_VERSION}

    def tokenize(self, clips: Sequence[FloatArray], max_seconds: float) -> list[torch.Tensor]:
        """float16 [time, bands, width] of the first `max_seconds` of each mono 48 kHz clip [T].

        Raises:
            ValueError: a clip is empty, not mono, or not finite.
        """
        self.encoder.load()
        return [yamnet_tokens(extract_audio_features(self.encoder, preprocess_waveform(clip, max_seconds))) for clip in clips]


class AstTokenizer:
    """Tokens of an Audio Spectrogram Transformer: 12 bands, 0.1 s apart."""

    name: ClassVar[str] = "ast"
    family: ClassVar[str] = AstEncoder.family

    def __init__(self, encoder: AstEncoder) -> None:
        self.encoder = encoder

    @property
    def bands(self) -> int:
        """Tokens per time step."""
        return self.encoder.bands

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.encoder.dimension

    def describe(self) -> dict[str, Any]:
        """Everything except the audio that determines the tokens."""
        return {**self.encoder.describe(), "grids": TOKENS_VERSION}

    def tokenize(self, clips: Sequence[FloatArray], max_seconds: float) -> list[torch.Tensor]:
        """Like `YamnetTokenizer.tokenize`."""
        self.encoder.load()
        grids = self.encoder.grids([clip[: math.ceil(max_seconds * STORED_RATE)] for clip in clips])
        return [torch.from_numpy(grid).half() for grid in grids]


GridTokenizer = YamnetTokenizer | AstTokenizer
