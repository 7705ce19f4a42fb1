"""Judge `aisfx`: embeddings of sound effects (Ma and Lerch, ISMIR 2022; weights CC BY 4.0, by the authors).

Source: model X-Sequential-CE of `aisfx` 0.1.2. The mel bands follow the paper's Essentia front-end, because the package's
librosa variant passes a transposed spectrogram to the network.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F

from pipeline_steps.audio.mel import aisfx_log_mel
from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.evaluate.judges.base import AUDIO_JUDGES, AudioFeatureExtractor, JudgeSetup
from pipeline_steps.models.bundled_weights import BundledModel

SAMPLE_RATE = 44_100
BLOCK_FRAMES = 100
"""2.3 s."""
BLOCK_HOP = 50
MAX_LOG_MEL = 9.457798957824707
"""Maximum of the log-mel values of the authors' training data; inputs are divided by it."""


@AUDIO_JUDGES.register("aisfx")
class AiSfx(BundledModel, AudioFeatureExtractor):
    """Audio clip to 512 numbers: the mean over blocks of 2.3 s that overlap by half."""

    name = "aisfx"
    family = "aisfx"
    version = 1
    files = ("aisfx.safetensors",)

    @classmethod
    def from_setup(cls, setup: JudgeSetup) -> Self:
        """Weights of the stage `assets`."""
        return cls(setup.assets)

    def blocks(self, samples_48k: FloatArray) -> FloatArray:
        """Normalized log-mel blocks [N, 100 frames, 96 bands] of mono 48 kHz audio; a short clip is repeated."""
        samples = resample(samples_48k, 48_000, SAMPLE_RATE)
        peak = float(np.abs(samples).max(initial=0.0))
        log_mel = aisfx_log_mel(samples / peak if peak > 0 else samples) / np.float32(MAX_LOG_MEL)
        if len(log_mel) < BLOCK_FRAMES:
            log_mel = np.tile(log_mel, (-(-BLOCK_FRAMES // len(log_mel)), 1))[:BLOCK_FRAMES]
        count = 1 + (len(log_mel) - BLOCK_FRAMES) // BLOCK_HOP
        return np.stack([log_mel[i * BLOCK_HOP : i * BLOCK_HOP + BLOCK_FRAMES] for i in range(count)])

    @torch.inference_mode()
    def embed(self, samples_48k: FloatArray) -> FloatArray:
        """Vector [512] of mono 48 kHz audio."""
        rows = self.forward(torch.from_numpy(self.blocks(samples_48k)).to(self.device))
        vector: FloatArray = rows.mean(0).cpu().numpy()
        return vector

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """Features [N, 512] of blocks [N, 100, 96]."""
        hidden = blocks[:, None]
        for index in range(1, 5):
            for part in (1, 2):
                name = f"block{index}.{part}"
                hidden = F.relu(F.conv2d(hidden, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], padding=1))
            if index < 4:
                hidden = F.max_pool2d(hidden, 2)
        return hidden.mean(3).amax(2)
