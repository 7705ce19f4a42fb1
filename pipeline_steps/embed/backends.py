"""The text-audio encoders as the stage uses them: what the memo keeps of a text or sound, and how vectors come of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.models.text_audio.clap import ClapEncoder
from pipeline_steps.models.text_audio.laion_clap import LaionClapEncoder
from pipeline_steps.models.text_audio.yamnet_minilm import PROMPTS, YamnetMiniLMEncoder


class EmbeddingBackend(Protocol):
    """One text-audio space. Memo rows depend on their own text or sound alone."""

    @property
    def encoder(self) -> YamnetMiniLMEncoder | ClapEncoder | LaionClapEncoder:
        """The encoder, weights not loaded before `load`."""
        ...

    def load(self) -> None:
        """Load the weights; calling it again does nothing."""
        ...

    def describe_sounds(self) -> dict[str, Any]:
        """Everything but the sound that shapes its memo row."""
        ...

    def describe_texts(self) -> Any:
        """Everything but the text that shapes its memo row."""
        ...

    def prepare(self, samples_48k: FloatArray) -> FloatArray:
        """What is computed of a sound by itself, and may fail for it alone."""
        ...

    def sound_rows(self, prepared: Sequence[FloatArray]) -> list[FloatArray]:
        """Memo rows of prepared sounds, computed together."""
        ...

    def sounds(self, rows: FloatArray) -> FloatArray:
        """Unit vectors [N, D] of memo rows [N, W]."""
        ...

    def text_rows(self, texts: Sequence[str]) -> FloatArray:
        """Memo rows [N, W] of texts, computed together."""
        ...

    def texts(self, rows: FloatArray) -> FloatArray:
        """Unit vectors [N, D] of memo rows [N, W]."""
        ...

    def meta(self) -> dict[str, Any]:
        """The head of `meta.json`: the name of the space, and of the encoder when it is not the bridge."""
        ...


class YamnetMiniLMBackend:
    """`bridge`: the memo keeps tag posteriors and MiniLM vectors, so that its parameters cost no network to change."""

    def __init__(self, encoder: YamnetMiniLMEncoder) -> None:
        self.encoder = encoder

    def load(self) -> None:
        self.encoder.load()

    def describe_sounds(self) -> dict[str, Any]:
        return self.encoder.describe_sounds()

    def describe_texts(self) -> Any:
        return [self.encoder.minilm.describe(), PROMPTS, self.encoder.recipe]

    def prepare(self, samples_48k: FloatArray) -> FloatArray:
        return self.encoder.posteriors(samples_48k)

    def sound_rows(self, prepared: Sequence[FloatArray]) -> list[FloatArray]:
        return list(prepared)

    def sounds(self, rows: FloatArray) -> FloatArray:
        return self.encoder.sounds_from_posteriors(rows)

    def text_rows(self, texts: Sequence[str]) -> FloatArray:
        return self.encoder.embed_prompts(texts)

    def texts(self, rows: FloatArray) -> FloatArray:
        return self.encoder.texts_from_prompted(rows)

    def meta(self) -> dict[str, Any]:
        return {"space": f"yamnet-minilm-{self.encoder.name}/{self.encoder.recipe}"}


class ClapBackend:
    """`clap` and `laion`: the memo keeps the vectors themselves."""

    def __init__(self, encoder: ClapEncoder | LaionClapEncoder) -> None:
        self.encoder = encoder

    def load(self) -> None:
        self.encoder.load()

    def describe_sounds(self) -> dict[str, Any]:
        return self.encoder.describe_sounds()

    def describe_texts(self) -> Any:
        return self.encoder.describe_texts()

    def prepare(self, samples_48k: FloatArray) -> FloatArray:
        return self.encoder.prepare(samples_48k)

    def sound_rows(self, prepared: Sequence[FloatArray]) -> list[FloatArray]:
        return list(self.encoder.encode_prepared(prepared))

    def sounds(self, rows: FloatArray) -> FloatArray:
        return np.asarray(rows, np.float32)

    def text_rows(self, texts: Sequence[str]) -> FloatArray:
        return self.encoder.encode_texts(texts)

    def texts(self, rows: FloatArray) -> FloatArray:
        return np.asarray(rows, np.float32)

    def meta(self) -> dict[str, Any]:
        return {"space": "@".join([self.encoder.name, *self.encoder.identity.values()]), "encoder": self.encoder.name}
