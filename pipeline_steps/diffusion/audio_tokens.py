"""Sounds as grids of encoder tokens [moments, bands, width], in order of time: what the resampler of an adapter looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.diffusion.audio_features import FEATURE_WIDTH, AudioFeatures, extract_audio_features, preprocess_waveform
from pipeline_steps.models.audio.ast import STORED_RATE, AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet

GRIDS_VERSION = 1
"""Raised whenever a grid changes: part of the memo's fingerprint."""


def yamnet_tokens(features: AudioFeatures) -> torch.Tensor:
    """float16 [moments, 1, 1024]: YAMNet's frames, 0.16 s apart. The root evens out their range, as in `AudioConditioner`."""
    return features.frames.float().sqrt().half()[:, None]


class YamnetTokenizer:
    """Grids of one band from YAMNet's last feature map."""

    name: ClassVar[str] = "yamnet"
    family: ClassVar[str] = YamNet.family
    bands, width = 1, FEATURE_WIDTH

    def __init__(self, encoder: YamNet) -> None:
        self.encoder = encoder

    def describe(self) -> dict[str, Any]:
        """Everything but the sound that shapes its grid."""
        return {**self.encoder.describe(), "grids": GRIDS_VERSION}

    def grids(self, sounds: Sequence[FloatArray], max_seconds: float) -> list[torch.Tensor]:
        """One grid for each mono 48 kHz sound [T], of which `max_seconds` are heard.

        Raises:
            ValueError: a sound is empty, not mono, or not finite.
        """
        self.encoder.load()
        return [
            yamnet_tokens(extract_audio_features(self.encoder, preprocess_waveform(sound, max_seconds))) for sound in sounds
        ]


class AstTokenizer:
    """Grids of an Audio Spectrogram Transformer: 12 bands, 0.1 s apart."""

    name: ClassVar[str] = "ast"
    family: ClassVar[str] = AstEncoder.family

    def __init__(self, encoder: AstEncoder) -> None:
        self.encoder = encoder

    @property
    def bands(self) -> int:
        """Tokens of one moment."""
        return self.encoder.bands

    @property
    def width(self) -> int:
        """Numbers in a token."""
        return self.encoder.dimension

    def describe(self) -> dict[str, Any]:
        """Everything but the sound that shapes its grid."""
        return {**self.encoder.describe(), "grids": GRIDS_VERSION}

    def grids(self, sounds: Sequence[FloatArray], max_seconds: float) -> list[torch.Tensor]:
        """As `YamNetGrids.grids`."""
        self.encoder.load()
        heard = self.encoder.grids([sound[: math.ceil(max_seconds * STORED_RATE)] for sound in sounds])
        return [torch.from_numpy(grid).half() for grid in heard]


GridEncoder = YamnetTokenizer | AstTokenizer
