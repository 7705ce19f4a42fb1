"""Generation of the evaluated images: protocol of a generator, and the generator of an exported model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline_steps.audio.mixing import Tracks, mix_tracks
from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.base import AudioConditionedPipeline, interpolate_embeds
from pipeline_steps.models.audio.yamnet import SAMPLE_RATE


class ImageGenerator(Protocol):
    """Reproducible generator of images from audio.

    Attributes:
        resolution: side of a generated image in px.
        sample_rate_hz: sample rate of the model's audio encoder.
        guidance_scale, num_inference_steps: settings of the generation.
        families: model families of the pretrained networks in the model.
        has_text_encoder: whether `generate_from_text` works.
    """

    resolution: int
    sample_rate_hz: int
    guidance_scale: float
    num_inference_steps: int
    families: frozenset[str]
    has_text_encoder: bool

    def generate(self, clips: Sequence[FloatArray], num_samples: int, seed: int) -> ByteArray:
        """RGB uint8 [M, num_samples, side, side, 3] from mono 48 kHz audio.

        Sample s of every clip starts from the same noise, so that differences between clips come from the audio.
        """
        ...

    def generate_unconditional(self, count: int, seed: int) -> ByteArray:
        """RGB uint8 [count, side, side, 3] without audio."""
        ...

    def generate_from_text(self, texts: Sequence[str], num_samples: int, seed: int) -> ByteArray:
        """RGB uint8 [T, num_samples, side, side, 3] from texts without audio; requires `has_text_encoder`."""
        ...

    def generate_interpolated(
        self, first: FloatArray, second: FloatArray, fractions: Sequence[float], num_samples: int, seed: int
    ) -> ByteArray:
        """RGB uint8 [P, num_samples, side, side, 3] from the embeddings on the way between two clips, 0: the first one."""
        ...

    def generate_with_text(
        self, clip: FloatArray, text: str, audio_scales: Sequence[float], num_samples: int, seed: int
    ) -> ByteArray:
        """RGB uint8 [P, num_samples, side, side, 3] from a clip beside a text; requires `has_text_encoder`."""
        ...


def render(tracks: Tracks, load_audio: Callable[[str], FloatArray]) -> FloatArray:
    """Mix tracks into mono 48 kHz audio, as training does; `load_audio` reads a clip by id."""
    return mix_tracks([(load_audio(audio_id), gain) for audio_id, gain in tracks])


class PipelineImageGenerator:
    """`ImageGenerator` of an `AudioConditionedPipeline`.

    Args:
        pipeline: the loaded model.
        guidance_scale, num_inference_steps: None takes the model's default.
    """

    def __init__(
        self, pipeline: AudioConditionedPipeline, guidance_scale: float | None, num_inference_steps: int | None
    ) -> None:
        defaults = pipeline.generation_config
        self._pipeline = pipeline
        self.resolution = defaults.resolution
        self.sample_rate_hz = SAMPLE_RATE
        self.guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        self.num_inference_steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.has_text_encoder = pipeline.has_text_encoder
        self.families = pipeline.families

    def generate(self, clips: Sequence[FloatArray], num_samples: int, seed: int) -> ByteArray:
        """RGB uint8 [M, num_samples, side, side, 3] from mono 48 kHz audio."""
        tokens = [self._pipeline.encode_audio(clip) for clip in clips]
        return self._pipeline.generate_batch(tokens, num_samples, seed, self.guidance_scale, self.num_inference_steps)

    def generate_unconditional(self, count: int, seed: int) -> ByteArray:
        """RGB uint8 [count, side, side, 3] without audio."""
        return self._pipeline.generate_unconditional(count, seed, self.num_inference_steps)

    def generate_from_text(self, texts: Sequence[str], num_samples: int, seed: int) -> ByteArray:
        """RGB uint8 [T, num_samples, side, side, 3] from texts, by a model whose backbone has a text encoder."""
        return self._pipeline.generate_from_text(list(texts), num_samples, seed, self.guidance_scale, self.num_inference_steps)

    def generate_interpolated(
        self, first: FloatArray, second: FloatArray, fractions: Sequence[float], num_samples: int, seed: int
    ) -> ByteArray:
        """RGB uint8 [P, num_samples, side, side, 3] from the embeddings on the way between two clips, 0: the first one."""
        start, end = (self._pipeline.encode_audio(clip) for clip in (first, second))
        tokens = [interpolate_embeds(start, end, fraction) for fraction in fractions]
        return self._pipeline.generate_batch(tokens, num_samples, seed, self.guidance_scale, self.num_inference_steps)

    def generate_with_text(
        self, clip: FloatArray, text: str, audio_scales: Sequence[float], num_samples: int, seed: int
    ) -> ByteArray:
        """RGB uint8 [P, num_samples, side, side, 3] from a clip beside a text, by a model whose backbone has a text encoder."""
        tokens = [self._pipeline.encode_audio(clip)]
        settings = (num_samples, seed, self.guidance_scale, self.num_inference_steps)
        return np.concatenate(
            [self._pipeline.generate_from_audio_and_text(tokens, text, scale, *settings) for scale in audio_scales]
        )


def load_generator(folder: Path, guidance_scale: float | None, num_inference_steps: int | None) -> PipelineImageGenerator:
    """Generator of the exported model in `folder`.

    Raises:
        DataError, IntegrityError: the folder does not hold a complete, unchanged model.
    """
    return PipelineImageGenerator(AutoAudio2ImagePipeline.from_pretrained(folder), guidance_scale, num_inference_steps)
