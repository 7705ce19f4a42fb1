"""Generator whose images follow one property of the audio, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from tests.evaluate.synthetic_dataset import CLASSES

Samples = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]
Property = Literal["mixture", "loudest", "level", "reverberation", "nothing"]
SIDE = 32


class PropertyGenerator:
    """Generates a square on a white background.

    - mixture: its color mixes the colors of the classes by their level in dB.
    - loudest: its color is that of the loudest class.
    - level: its side grows with the level.
    - reverberation: its side grows with the energy at the end of the clip.
    - nothing: color and side depend on the noise alone.
    """

    resolution, sample_rate_hz, guidance_scale, num_inference_steps = SIDE, 16_000, 1.0, 1
    families = frozenset({"yamnet"})

    def __init__(self, follows: Property, has_text_encoder: bool = False, reads_words: bool = True) -> None:
        self.follows, self.has_text_encoder, self.reads_words = follows, has_text_encoder, reads_words

    def generate(self, clips: Sequence[Samples], num_samples: int, seed: int) -> Images:
        return np.stack([self._draw(self._weights(clip), self._side(clip), num_samples, seed) for clip in clips])

    def generate_interpolated(
        self, first: Samples, second: Samples, fractions: Sequence[float], num_samples: int, seed: int
    ) -> Images:
        ends = [(self._weights(clip), self._side(clip)) for clip in (first, second)]
        between = [[(1 - at) * a + at * b for a, b in zip(*ends, strict=True)] for at in fractions]
        return np.stack([self._draw(weights, side, num_samples, seed) for weights, side in between])

    def generate_with_text(
        self, clip: Samples, text: str, audio_scales: Sequence[float], num_samples: int, seed: int
    ) -> Images:
        word = np.array([float(label == text) for label in CLASSES]) if self.reads_words else np.zeros(len(CLASSES))
        return np.stack(
            [
                self._draw((1 - scale) * word + scale * self._weights(clip), self._side(clip), num_samples, seed)
                for scale in audio_scales
            ]
        )

    def generate_unconditional(self, count: int, seed: int) -> Images:
        return self._draw(np.zeros(len(CLASSES)), 12.0, count, seed)

    def generate_from_text(self, texts: Sequence[str], num_samples: int, seed: int) -> Images:
        return np.stack([self.generate_unconditional(num_samples, seed) for _ in texts])

    def _weights(self, clip: Samples) -> npt.NDArray[np.float64]:
        spectrum = np.abs(np.fft.rfft(clip.astype(np.float64))) ** 2
        hertz = np.fft.rfftfreq(len(clip), 1 / 48_000)
        energy = np.array([spectrum[np.abs(hertz / pitch - 1) < 0.3].sum() for pitch, _ in CLASSES.values()])
        decibel = 10 * np.log10(energy / energy.max() + 1e-9)
        if self.follows == "mixture":
            weights = np.maximum(decibel + 40, 0)
        elif self.follows == "loudest":
            weights = (energy == energy.max()).astype(float)
        else:
            weights = np.zeros(len(CLASSES))
        return weights / max(float(weights.sum()), 1e-9)

    def _side(self, clip: Samples) -> float:
        power = clip.astype(np.float64) ** 2
        if self.follows == "level":
            return 16 + 0.3 * (10 * np.log10(power.mean() + 1e-9) + 26)
        if self.follows == "reverberation":
            return 24 + 0.15 * 10 * np.log10(power[-len(clip) // 2 :].mean() / power.mean() + 1e-6)
        return 12.0

    def _draw(self, weights: npt.NDArray[np.float64], side: float, num_samples: int, seed: int) -> Images:
        colors = np.array([color for _, color in CLASSES.values()], float)
        images = np.full((num_samples, SIDE, SIDE, 3), 255, np.uint8)
        for sample in range(num_samples):
            rng = np.random.default_rng([seed, sample])
            color = weights @ colors + (1 - weights.sum()) * rng.integers(0, 200, 3)
            rows = max(2, int(side + rng.integers(0, 3)))
            images[sample, 2 : 2 + rows, 2 : 2 + int(max(2, min(side, 28)))] = np.clip(color, 0, 200)
        return images
