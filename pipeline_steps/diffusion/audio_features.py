"""Audio features of recipe `scratch`: YAMNet's feature map and tag logits per patch, and the level of the clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipeline_steps.audio.loudness import integrated_loudness, peak_dbfs
from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.models.audio.yamnet import SAMPLE_RATE, YamNet

FEATURES_VERSION = 1
"""Version of the features, part of the cache fingerprint. Raise it whenever their values change."""

MIN_SECONDS = 2.0
"""Shorter clips are repeated up to this length, because YAMNet is weak on clips of less than a patch."""
FLOOR_DB = -70.0
"""Loudness assigned to silence."""
FRAMES_PER_PATCH = 3
"""Time steps of YAMNet's feature map in a patch of 0.96 s."""
FEATURE_WIDTH = 1024
TAGS = 521


@dataclass(frozen=True, slots=True)
class AudioFeatures:
    """Features of one clip.

    Attributes:
        frames: [patches * 3, 1024] feature map averaged over its two mel bands; >= 0, about 0.16 s apart.
        logits: [patches, 521] AudioSet tag logits.
        level: [2] integrated loudness (LUFS) and peak (dBFS), floored at -70.
    """

    frames: torch.Tensor
    logits: torch.Tensor
    level: torch.Tensor

    @property
    def patches(self) -> int:
        """Number of patches, 0.48 s apart."""
        return len(self.logits)

    def window(self, first: int, count: int) -> AudioFeatures:
        """Features of `count` patches from patch `first` on; the level stays that of the whole clip."""
        rows = slice(first * FRAMES_PER_PATCH, (first + count) * FRAMES_PER_PATCH)
        return AudioFeatures(self.frames[rows], self.logits[first : first + count], self.level)


def preprocess_waveform(samples_48k: FloatArray, max_seconds: float) -> FloatArray:
    """Resample a clip to 16 kHz, cut it at `max_seconds` and repeat it up to 2 s. The level is not changed.

    Raises:
        ValueError: the samples are empty, not one-dimensional, or contain NaN or infinity.
    """
    if samples_48k.ndim != 1 or not samples_48k.size or not np.isfinite(samples_48k).all():
        raise ValueError(f"expected finite mono samples [T], got shape {samples_48k.shape}")
    samples = resample(samples_48k[: math.ceil(max_seconds * 48_000)], 48_000, SAMPLE_RATE)
    shortest = int(MIN_SECONDS * SAMPLE_RATE)
    return samples if len(samples) >= shortest else np.resize(samples, shortest)


def extract_audio_features(encoder: YamNet, samples_16k: FloatArray) -> AudioFeatures:
    """Features of a preprocessed 16 kHz clip [T]. One clip per call, so that rounding does not depend on a batch."""
    with torch.inference_mode():
        logits, _, feature_map = encoder(torch.from_numpy(encoder.frames(samples_16k)))
        frames = feature_map.mean(3).permute(0, 2, 1).reshape(-1, FEATURE_WIDTH)
    level = [max(FLOOR_DB, integrated_loudness(samples_16k, SAMPLE_RATE)), max(FLOOR_DB, peak_dbfs(samples_16k))]
    return AudioFeatures(frames.clone(), logits.clone(), torch.tensor(level))
