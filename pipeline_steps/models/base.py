"""Interfaces of pretrained models that stages use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from pipeline_steps.core.array_types import FloatArray


@runtime_checkable
class TextAudioEncoder(Protocol):
    """Encoder of texts and audio into unit vectors of one space."""

    name: str
    family: str
    """Models of one family are related; a judge must not belong to a family that the pipeline used."""
    version: int
    """Part of fingerprints; raise it when outputs change."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, family, version and hashes of weights, for fingerprints."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> FloatArray:
        """Unit vectors [N, dimension] of texts."""
        ...

    def encode_sounds(self, sounds: Sequence[FloatArray]) -> FloatArray:
        """Unit vectors [N, dimension] of mono 48 kHz clips."""
        ...
