"""The exported model as a source of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline_steps.diffusion.pipeline import Audio2ImagePipeline
from pipeline_steps.encoders.clip_vision import ClipVision
from pipeline_steps.encoders.yamnet import SAMPLE_RATE

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


class ModelSource:
    """`PictureSource` on top of `Audio2ImagePipeline`.

    Args:
        pipeline: the loaded model.
        guidance_scale, steps: None takes what the model was exported with.
    """

    def __init__(self, pipeline: Audio2ImagePipeline, guidance_scale: float | None, steps: int | None) -> None:
        self._pipeline = pipeline
        self.side = pipeline.defaults.picture_size
        self.sample_rate_hz = SAMPLE_RATE
        self.guidance_scale = pipeline.defaults.guidance_scale if guidance_scale is None else guidance_scale
        self.steps = pipeline.defaults.steps if steps is None else steps
        self.reads_text = pipeline.reads_text
        # A Stable Diffusion learned to draw from CLIP's tokens: what CLIP likes is what it draws.
        self.families = pipeline.families | ({ClipVision.family} if self.reads_text else set())

    def draw(self, sounds: Sequence[FloatArray], samples: int, seed: int) -> ByteArray:
        """RGB uint8 [M, samples, side, side, 3] from mono 48 kHz sounds."""
        tokens = [self._pipeline.hear(sound) for sound in sounds]
        return self._pipeline.draw_many(tokens, samples, seed, self.guidance_scale, self.steps)

    def unconditional(self, count: int, seed: int) -> ByteArray:
        """RGB uint8 [count, side, side, 3] without a sound."""
        return self._pipeline.draw_unconditional(count, seed, self.steps)

    def draw_texts(self, texts: Sequence[str], samples: int, seed: int) -> ByteArray:
        """RGB uint8 [T, samples, side, side, 3] from texts alone, by a model whose backbone reads them."""
        return self._pipeline.draw_texts(list(texts), samples, seed, self.guidance_scale, self.steps)


def open_source(folder: Path, guidance_scale: float | None, steps: int | None) -> ModelSource:
    """Load the exported folder.

    Raises:
        DataError, IntegrityError: the folder is not a whole, unchanged model.
    """
    return ModelSource(Audio2ImagePipeline.load(folder), guidance_scale, steps)
