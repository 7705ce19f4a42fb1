"""Captions of clips from the tags of YAMNet, for the row `caption_route`; ground truth is not used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline_steps.audio.resample import resample
from pipeline_steps.core.array_types import DoubleArray, FloatArray
from pipeline_steps.models.audio.yamnet import SAMPLE_RATE, YamNet

MAX_TAGS = 3
MIN_RATIO = 0.5
"""Smallest probability of a tag relative to that of the best one."""


def caption_audio(tagger: YamNet, samples_48k: FloatArray) -> str:
    """Names of the most probable tags of a mono 48 kHz clip, as one text."""
    tagger.load()
    samples = resample(samples_48k, 48_000, SAMPLE_RATE)
    with torch.inference_mode():
        logits, _, _ = tagger(torch.from_numpy(tagger.frames(samples)))
    return tag_text(logits.sigmoid().mean(0).double().numpy(), tagger.class_names)


def tag_text(probabilities: DoubleArray, names: Sequence[str]) -> str:
    """The best tag and at most two more of at least half its probability, best first: "dog, bark"."""
    order = np.argsort(-probabilities, kind="stable")[:MAX_TAGS]
    kept = [row for row in order if probabilities[row] >= MIN_RATIO * probabilities[order[0]]]
    return ", ".join(names[row].lower() for row in kept)
