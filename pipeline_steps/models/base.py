"""What the stages ask of a model, whoever made it. Implementations live beside this file, one file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pipeline_steps.core.array_types import ByteArray, FloatArray


@dataclass(frozen=True, slots=True)
class SoundEvent:
    """One sound a picture suggests.

    Attributes:
        sound: short acoustic phrase, e.g. "a dog barking".
        source: what makes it, e.g. "dog".
        visible: whether the source is seen, not only inferred from the scene.
        salience: 0..1, prominence within the scene.
        confidence: 0..1, that the source is there and is heard.
    """

    sound: str
    source: str
    visible: bool
    salience: float
    confidence: float


@runtime_checkable
class PretrainedModel(Protocol):
    """What every implementation has: a family (so that no judge judges its own kind) and a version (raised with outputs)."""

    name: str
    family: str
    version: int

    def describe(self) -> dict[str, Any]:
        """Name, family, version and weights' sha256: the part of a fingerprint that this model is responsible for."""
        ...


@runtime_checkable
class SoundCaptioner(PretrainedModel, Protocol):
    """Pictures -> the sounds they suggest. The empty list is a valid answer: the picture makes no sound."""

    def caption(self, images: Sequence[ByteArray]) -> list[list[SoundEvent]]:
        """Events of each picture, most prominent first."""
        ...


@runtime_checkable
class AudioTokenizer(PretrainedModel, Protocol):
    """A sound -> tokens for cross-attention."""

    dimension: int

    def tokens(self, samples_48k: FloatArray) -> FloatArray:
        """Tokens [T, dimension] of a mono 48 kHz sound."""
        ...


@runtime_checkable
class ImageAutoencoder(PretrainedModel, Protocol):
    """Pictures <-> latents. Pictures are float torch tensors [N, 3, H, W] in [-1, 1]."""

    def encode(self, pictures: Any) -> Any:
        """Latents [N, C, h, w] of pictures."""
        ...

    def decode(self, latents: Any) -> Any:
        """Pictures [N, 3, H, W] of latents."""
        ...


@runtime_checkable
class ImageFeatureExtractor(PretrainedModel, Protocol):
    """Pictures -> feature rows for distances and similarities."""

    def features(self, images: Sequence[ByteArray]) -> FloatArray:
        """Rows [N, D], not normalised."""
        ...


@runtime_checkable
class AudioFeatureExtractor(PretrainedModel, Protocol):
    """A sound -> one feature vector for similarities."""

    def embed(self, samples_48k: FloatArray) -> FloatArray:
        """Vector [D] of a mono 48 kHz sound, not normalised."""
        ...
