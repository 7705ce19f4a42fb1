"""Text-audio encoders: base class, artifacts that the result cache keeps, and registry.

An encoder computes cache rows, one per text and one per clip, and unit vectors from these rows. By default a row is the vector.
A module that registers an encoder imports torch and other large packages inside functions only, because configuration is
validated in processes that compute nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.registry import Registry
from pipeline_steps.core.result_cache import ResultCache


@dataclass(frozen=True, slots=True)
class CachedArtifact:
    """Value that an encoder computes once, beside the rows of texts and clips, and that the result cache keeps.

    Attributes:
        stage: stage name in the result cache.
        key: key of its only row.
        schema: schema of the row, one column.
        description: everything that shapes the value.
        compute: returns the value.
        adopt: gives the value to the encoder.
    """

    stage: str
    key: str
    schema: pa.Schema
    description: Any
    compute: Callable[[], Any]
    adopt: Callable[[Any], None]

    def load_or_compute(self, cache_url: str) -> tuple[Any, bool]:
        """Value from the cache, computed and stored on a miss, and whether it was cached."""
        cache = ResultCache(cache_url, self.stage, fingerprint(self.description), self.schema)
        column = self.schema.names[0]
        if rows := cache.load([self.key]):
            return rows[self.key][column], True
        value = self.compute()
        cache.append({self.key: {column: value}})
        return value, False

    def restore(self, cache_url: str) -> bool:
        """Give the encoder the value from the cache, computed on a miss; return whether it was cached."""
        value, cached = self.load_or_compute(cache_url)
        self.adopt(value)
        return cached


class TextAudioEncoder(ABC):
    """Encoder of texts and audio into unit vectors of one space.

    A cache row depends on its own text or clip alone. Audio is mono float32 at 48 kHz.

    Attributes:
        name: recorded in `meta.json` of the embeddings; the registered name.
        family, families: model families, so that evaluation can reject judges of the same kind.
        version: raised with every change of the outputs.
        config_class: model of the configuration group; None for an encoder without parameters.
        recorded_as: keys of the configuration group that `meta.json` records under another name.
        vectors_need_weights: whether `audio_vectors` or `text_vectors` use the weights.
        rebuild_tolerance: largest difference of a vector's numbers after the encoder is rebuilt from `parameters`.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    families: ClassVar[tuple[str, ...]]
    version: ClassVar[int]
    config_class: ClassVar[type[StageConfig] | None] = None
    recorded_as: ClassVar[Mapping[str, str]] = {}
    vectors_need_weights: ClassVar[bool] = False
    rebuild_tolerance: ClassVar[float] = 1e-2

    def __init__(self, config: Any, layout: ProjectPaths) -> None:
        """Store the configuration group (an instance of `config_class`). Load no weights, download nothing."""
        self.config = config

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Check the configuration group of the selected encoder.

        Raises:
            ValueError: a key that the encoder needs has no value.
        """
        return

    @property
    @abstractmethod
    def dimension(self) -> int:
        """Length of a vector."""

    @abstractmethod
    def load(self) -> Self:
        """Load the weights; a second call does nothing."""

    @abstractmethod
    def describe(self) -> Any:
        """Everything that shapes the space: its fingerprint is recorded in `meta.json`."""

    @abstractmethod
    def audio_rows(self, prepared: Sequence[FloatArray]) -> Sequence[FloatArray] | FloatArray:
        """Cache rows of prepared clips, computed together."""

    @abstractmethod
    def text_rows(self, texts: Sequence[str]) -> FloatArray:
        """Cache rows [N, W] of texts, computed together."""

    def describe_audio(self) -> Any:
        """Everything but the clip that shapes its cache row."""
        return self.describe()

    def describe_texts(self) -> Any:
        """Everything but the text that shapes its cache row."""
        return self.describe()

    def prepare_audio(self, samples_48k: FloatArray) -> FloatArray:
        """Input of `audio_rows` for one clip. An error concerns this clip alone."""
        return samples_48k

    def audio_vectors(self, rows: FloatArray) -> FloatArray:
        """Unit vectors [N, dimension] of cache rows [N, W] of clips."""
        return np.asarray(rows, np.float32)

    def text_vectors(self, rows: FloatArray) -> FloatArray:
        """Unit vectors [N, dimension] of cache rows [N, W] of texts."""
        return np.asarray(rows, np.float32)

    def encode_audio(self, clips: Sequence[FloatArray]) -> FloatArray:
        """Unit vectors [N, dimension] of clips."""
        if not clips:
            return np.zeros((0, self.dimension), np.float32)
        return self.audio_vectors(np.stack(list(self.audio_rows([self.prepare_audio(clip) for clip in clips]))))

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors [N, dimension] of texts."""
        return self.text_vectors(self.text_rows(texts)) if texts else np.zeros((0, self.dimension), np.float32)

    @property
    def parameters(self) -> dict[str, Any]:
        """Argument of `from_parameters` that rebuilds this encoder; recorded in `meta.json`."""
        return {self.recorded_as.get(key, key): value for key, value in self.config.model_dump().items()} if self.config else {}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], layout: ProjectPaths) -> Self | None:
        """Encoder with recorded `parameters`; None if they are empty, because it needs files outside the project."""
        if cls.config_class is None:
            return cls(None, layout)
        keys = {recorded: key for key, recorded in cls.recorded_as.items()}
        values = {keys.get(key, key): value for key, value in parameters.items()}
        return cls(cls.config_class.model_validate(values), layout) if values else None

    def meta(self) -> dict[str, Any]:
        """First entries of `meta.json`: name of the space and of the encoder."""
        return {"space": self.name, "encoder": self.name}

    @property
    def model_names(self) -> tuple[str, str]:
        """Names of the audio network and of the text network, for messages."""
        return self.name, self.name

    def audio_artifact(self) -> CachedArtifact | None:
        """Artifact that `audio_rows` needs."""
        return None

    def text_artifact(self) -> CachedArtifact | None:
        """Artifact that `text_vectors` needs."""
        return None

    @classmethod
    def float32_config(cls, config: Any) -> tuple[Any, float] | None:
        """Configuration with float32 in place of 8-bit integers, and the recall@10 that 8-bit integers must reach.

        None if `config` does not use 8-bit integers.
        """
        return None


TEXT_AUDIO_ENCODERS: Registry[type[TextAudioEncoder]] = Registry("text-audio encoder", "pipeline_steps.models.text_audio")

RECORDED_NAMES = {"bridge": "yamnet_minilm", "laion": "laion_clap"}
"""Registered names of encoders that `meta.json` and fingerprints record under another name."""


def recorded_encoder(meta: Mapping[str, Any]) -> type[TextAudioEncoder]:
    """Class of the encoder that `meta.json` of the embeddings names.

    Raises:
        ConfigError: no implementation has that name.
    """
    name = str(meta.get("encoder", "bridge"))
    return TEXT_AUDIO_ENCODERS.get(RECORDED_NAMES.get(name, name))
