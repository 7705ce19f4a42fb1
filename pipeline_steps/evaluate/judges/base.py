"""Protocols and registries of judges: frozen networks that score generated images and took no part in making them.

A judge is one module of this package whose file name is the registered name:

    @IMAGE_JUDGES.register("my_judge")
    class MyJudge(ImageFeatureExtractor):
        name = family = "my_judge"
        version = 1

        def features(self, images): ...

`evaluate.image_judges` and `evaluate.audio_judge` select judges by name. This module imports no judge and no torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.registry import Registry


@dataclass(frozen=True, slots=True)
class JudgeSetup:
    """Arguments of `Judge.from_setup`.

    Attributes:
        assets: folder that stage `assets` wrote.
        root: project folder; a relative `model` may be a folder below it.
        model, revision: `evaluate.judge_checkpoints.<name>`; empty if it has no such entry.
        device, dtype: `evaluate.judge_checkpoints.device` and `.dtype`.
        config: group `evaluate.<name>`, an instance of the judge's `config_class`; None without such a class.
    """

    assets: Path
    root: Path
    model: str = ""
    revision: str = ""
    device: str = "auto"
    dtype: str = "float32"
    config: Any = None


class Judge(Protocol):
    """Members that both roles share; a class that inherits a role gets the defaults.

    Attributes:
        name: registered name.
        family: model family. A family that captioned, retrieved or conditioned is refused as a judge.
        version: raised when the features change, so that cached features are computed again.
        requires_checkpoint: whether `evaluate.judge_checkpoints.<name>.model` must be set.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    version: ClassVar[int]
    requires_checkpoint: ClassVar[bool] = False

    @classmethod
    def from_setup(cls, setup: JudgeSetup) -> Self:
        """Build the judge without loading its weights."""
        return cls()

    def fetch(self) -> object:
        """Download and check the weights. Called before images are generated, so that a missing model fails early."""
        return None

    def load(self) -> Self:
        """Load the weights; a second call does nothing."""
        return self

    @property
    def identity(self) -> Mapping[str, str]:
        """Entries that identify the weights in `evaluation.json`, e.g. hub id and commit."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Everything but the item that shapes a feature; the fingerprint of the cache."""
        return {"name": self.name, "family": self.family, "version": self.version}


@runtime_checkable
class ImageFeatureExtractor(Judge, Protocol):
    """Images to feature rows."""

    @property
    def batch_size(self) -> int:
        """Images of one forward pass; 1 if every image is computed alone, on one thread."""
        return 1

    @abstractmethod
    def features(self, images: Sequence[ByteArray]) -> FloatArray:
        """Rows [N, D] of RGB images uint8 [H, W, 3], not normalized."""

    def class_features(self, names: Sequence[str]) -> FloatArray | None:
        """Rows [N, D] of names of classes in the space of `features`; None if the judge has no text encoder."""
        return None


@runtime_checkable
class AudioFeatureExtractor(Judge, Protocol):
    """An audio clip to one feature vector."""

    @abstractmethod
    def embed(self, samples_48k: FloatArray) -> FloatArray:
        """Vector [D] of mono 48 kHz audio, not normalized."""


IMAGE_JUDGES: Registry[type[ImageFeatureExtractor]] = Registry("image judge", "pipeline_steps.evaluate.judges")
AUDIO_JUDGES: Registry[type[AudioFeatureExtractor]] = Registry("audio judge", "pipeline_steps.evaluate.judges")
