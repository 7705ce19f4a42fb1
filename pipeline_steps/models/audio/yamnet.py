"""YAMNet: AudioSet tags, a 1024-d embedding and a feature map of audio (Google, Apache-2.0; MobileNet v1 on log-mel patches).

Source: https://github.com/tensorflow/models/tree/master/research/audioset/yamnet (params.py, features.py, yamnet.py).
"""

from __future__ import annotations

import csv
import io

import numpy as np
import torch
import torch.nn.functional as F

from pipeline_steps.audio.mel import yamnet_log_mel
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.models.bundled_weights import BundledModel
from pipeline_steps.models.layers import conv2d_same

SAMPLE_RATE = 16_000
PATCH_FRAMES = 96
PATCH_HOP = 48
MIN_SAMPLES = 15_600
"""0.975 s: 96 frames of 10 ms hop and a 25 ms window."""
HOP_SAMPLES = PATCH_HOP * 160
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class YamNet(BundledModel):
    """Audio tagger and feature extractor in torch, differentiable in its inputs."""

    name = "yamnet"
    family = "yamnet"
    version = 1
    files = ("yamnet.safetensors", "audioset_classes.csv")

    class_names: list[str]
    """521 AudioSet display names in logit order."""

    def _prepare(self, payloads: dict[str, bytes]) -> None:
        rows = csv.DictReader(io.StringIO(payloads["audioset_classes.csv"].decode("utf-8")))
        self.class_names = [row["display_name"] for row in rows]

    def frames(self, samples_16k: FloatArray) -> FloatArray:
        """Log-mel patches [N, 1, 96 frames, 64 bands] of a mono 16 kHz clip, 0.96 s each, 0.48 s apart.

        The end is zero-padded to whole patches as the original does; a short clip gives one patch.
        """
        samples = np.asarray(samples_16k, dtype=np.float32)
        hops = -(-max(0, len(samples) - MIN_SAMPLES) // HOP_SAMPLES)
        padded = np.pad(samples, (0, MIN_SAMPLES + hops * HOP_SAMPLES - len(samples)))
        log_mel = yamnet_log_mel(padded)
        return np.stack([log_mel[i * PATCH_HOP : i * PATCH_HOP + PATCH_FRAMES] for i in range(hops + 1)])[:, None]

    def __call__(self, patches: FloatArray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the network on patches [N, 1, 96, 64].

        Results of a patch do not depend on the others up to floating-point rounding; pass one clip per call where bytes matter.

        Returns:
            logits [N, 521] (sigmoid gives the tag probabilities), embedding [N, 1024], feature map [N, 1024, 3 time, 2 mel].
        """
        weights = self.weights
        hidden = torch.as_tensor(patches, device=self.device)
        hidden = F.relu(conv2d_same(hidden, weights["stem.weight"], weights["stem.bias"], stride=2))
        for index, stride in enumerate(STRIDES):
            depthwise, pointwise = f"blocks.{index}.depthwise", f"blocks.{index}.pointwise"
            channels = hidden.shape[1]
            hidden = F.relu(conv2d_same(hidden, weights[f"{depthwise}.weight"], weights[f"{depthwise}.bias"], stride, channels))
            hidden = F.relu(F.conv2d(hidden, weights[f"{pointwise}.weight"], weights[f"{pointwise}.bias"]))
        embedding = hidden.mean((2, 3))
        logits = F.linear(embedding, weights["classifier.weight"], weights["classifier.bias"])
        return logits, embedding, hidden
