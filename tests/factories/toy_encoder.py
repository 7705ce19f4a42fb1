"""Complete text-audio encoder of another package: counts of letters, loudness of bands. Importing it registers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS, TextAudioEncoder


class ToyEncoderConfig(StageConfig):
    """Group `embed.toy`."""

    bands: int = Field(default=8, ge=2, le=26, description="length of a vector")


@TEXT_AUDIO_ENCODERS.register("toy")
class ToyEncoder(TextAudioEncoder):
    """Encoder without weights."""

    name = "toy"
    family = "toy"
    families = ("toy",)
    version = 1
    config_class = ToyEncoderConfig

    @property
    def dimension(self) -> int:
        return int(self.config.bands)

    def load(self) -> Self:
        return self

    def describe(self) -> Any:
        return {"name": self.name, "version": self.version, "bands": self.dimension}

    def text_rows(self, texts: Sequence[str]) -> FloatArray:
        counts = [[1.0 + text.count(chr(97 + band)) for band in range(self.dimension)] for text in texts]
        return _unit(np.array(counts, np.float32))

    def audio_rows(self, prepared: Sequence[FloatArray]) -> FloatArray:
        spectra = [np.abs(np.fft.rfft(clip)) for clip in prepared]
        return _unit(np.stack([[part.mean() + 1e-3 for part in np.array_split(one, self.dimension)] for one in spectra]))


def _unit(rows: np.ndarray) -> FloatArray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)
