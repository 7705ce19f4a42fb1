"""Judge `toy_audio`: mean magnitudes of frequency bands."""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.evaluate.judges.base import AUDIO_JUDGES, AudioFeatureExtractor

BANDS = 16


@AUDIO_JUDGES.register("toy_audio")
class ToyAudioJudge(AudioFeatureExtractor):
    """Mono 48 kHz audio to 16 numbers."""

    name = family = "toy_audio"
    version = 1

    def embed(self, samples_48k: FloatArray) -> FloatArray:
        spectrum = np.abs(np.fft.rfft(samples_48k))
        bands = [float(band.mean()) for band in np.array_split(spectrum, BANDS)]
        return np.log1p(np.array(bands, np.float32))
