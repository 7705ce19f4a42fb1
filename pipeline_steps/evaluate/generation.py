"""Where drawn pictures come from: the model behind the two calls that evaluation needs, and the sounds it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from pipeline_steps.audio.mixing import mix_tracks
from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.base import Audio2ImagePipeline
from pipeline_steps.evaluate.evaluation_plan import Track
from pipeline_steps.evaluate.judges.clip import ClipImageEncoder
from pipeline_steps.models.audio.yamnet import SAMPLE_RATE


class ImageGenerator(Protocol):
    """Something that draws from sounds, reproducibly.

    Attributes:
        side: pixels of a drawn picture, which is square.
        sample_rate_hz: the rate the model hears at.
        guidance_scale, steps: how it draws.
        families: of the pretrained networks inside the model.
        has_text_encoder: whether `draw_texts` works.
    """

    side: int
    sample_rate_hz: int
    guidance_scale: float
    steps: int
    families: frozenset[str]
    has_text_encoder: bool

    def draw(self, sounds: Sequence[FloatArray], samples: int, seed: int) -> ByteArray:
        """RGB uint8 [M, samples, side, side, 3] from mono 48 kHz sounds; sample s starts from the same noise for every
        sound, so that differences between sounds come from the sounds."""
        ...

    def unconditional(self, count: int, seed: int) -> ByteArray:
        """RGB uint8 [count, side, side, 3] without a sound."""
        ...

    def generate_from_text(self, texts: Sequence[str], samples: int, seed: int) -> ByteArray:
        """RGB uint8 [T, samples, side, side, 3] from texts, without a sound; only where `has_text_encoder`."""
        ...


def render(tracks: Sequence[Track], sound: Callable[[str], FloatArray]) -> FloatArray:
    """The mono 48 kHz sound of a pair: its tracks with their gains in dB, mixed as training hears them."""
    return mix_tracks([(sound(audio_id), gain) for audio_id, gain in tracks])


class PipelineImageGenerator:
    """`PictureSource` on top of `Audio2ImagePipeline`.

    Args:
        pipeline: the loaded model.
        guidance_scale, steps: None takes what the model was exported with.
    """

    def __init__(self, pipeline: Audio2ImagePipeline, guidance_scale: float | None, steps: int | None) -> None:
        self._pipeline = pipeline
        self.side = pipeline.generation_config.resolution
        self.sample_rate_hz = SAMPLE_RATE
        self.guidance_scale = pipeline.generation_config.guidance_scale if guidance_scale is None else guidance_scale
        self.steps = pipeline.generation_config.num_inference_steps if steps is None else steps
        self.has_text_encoder = pipeline.has_text_encoder
        # A Stable Diffusion learned to draw from CLIP's tokens: what CLIP likes is what it draws.
        self.families = pipeline.families | ({ClipImageEncoder.family} if self.has_text_encoder else set())

    def draw(self, sounds: Sequence[FloatArray], samples: int, seed: int) -> ByteArray:
        """RGB uint8 [M, samples, side, side, 3] from mono 48 kHz sounds."""
        tokens = [self._pipeline.encode_audio(sound) for sound in sounds]
        return self._pipeline.generate_batch(tokens, samples, seed, self.guidance_scale, self.steps)

    def unconditional(self, count: int, seed: int) -> ByteArray:
        """RGB uint8 [count, side, side, 3] without a sound."""
        return self._pipeline.generate_unconditional(count, seed, self.steps)

    def generate_from_text(self, texts: Sequence[str], samples: int, seed: int) -> ByteArray:
        """RGB uint8 [T, samples, side, side, 3] from texts alone, by a model whose backbone reads them."""
        return self._pipeline.generate_from_text(list(texts), samples, seed, self.guidance_scale, self.steps)


def load_generator(folder: Path, guidance_scale: float | None, steps: int | None) -> PipelineImageGenerator:
    """Load the exported folder.

    Raises:
        DataError, IntegrityError: the folder is not a whole, unchanged model.
    """
    return PipelineImageGenerator(AutoAudio2ImagePipeline.from_pretrained(folder), guidance_scale, steps)
