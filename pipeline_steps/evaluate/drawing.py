"""Where drawn pictures come from: the model behind the two calls that evaluation needs, and the sounds it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline_steps.audio.mixing import mix_tracks
from pipeline_steps.evaluate.items import Track

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]


class PictureSource(Protocol):
    """Something that draws from sounds, reproducibly.

    Attributes:
        side: pixels of a drawn picture, which is square.
        sample_rate_hz: the rate the model hears at.
        guidance_scale, steps: how it draws.
        families: of the pretrained networks inside the model.
        reads_text: whether `draw_texts` works.
    """

    side: int
    sample_rate_hz: int
    guidance_scale: float
    steps: int
    families: frozenset[str]
    reads_text: bool

    def draw(self, sounds: Sequence[FloatArray], samples: int, seed: int) -> ByteArray:
        """RGB uint8 [M, samples, side, side, 3] from mono 48 kHz sounds; sample s starts from the same noise for every
        sound, so that differences between sounds come from the sounds."""
        ...

    def unconditional(self, count: int, seed: int) -> ByteArray:
        """RGB uint8 [count, side, side, 3] without a sound."""
        ...

    def draw_texts(self, texts: Sequence[str], samples: int, seed: int) -> ByteArray:
        """RGB uint8 [T, samples, side, side, 3] from texts, without a sound; only where `reads_text`."""
        ...


def render(tracks: Sequence[Track], sound: Callable[[str], FloatArray]) -> FloatArray:
    """The mono 48 kHz sound of a pair: its tracks with their gains in dB, mixed as training hears them."""
    return mix_tracks([(sound(audio_id), gain) for audio_id, gain in tracks])
