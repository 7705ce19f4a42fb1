"""Interface of a training recipe: its configuration, its frozen models and the parts that the training loop needs.

This module and the `__init__.py` of a recipe's folder do not import torch, because they are imported to validate parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline_steps.core.config import StageConfig
from pipeline_steps.train.config_groups import (
    AudioEncodingConfig,
    ImageAugmentationConfig,
    OptimizerConfig,
    PhaseConfig,
    SamplingConfig,
)

if TYPE_CHECKING:
    from pipeline_steps.core.array_types import ByteArray
    from pipeline_steps.core.feature_store import FeatureStore
    from pipeline_steps.diffusion.audio_tokens import AudioTokenizer
    from pipeline_steps.train.audio_feature_cache import StoredClips
    from pipeline_steps.train.data import AudioImageDataModule
    from pipeline_steps.train.distributed import DistributedSetup
    from pipeline_steps.train.lightning_module import DiffusionModule


class RecipeConfig(StageConfig):
    """Base of the configuration of a recipe."""

    @property
    def phase(self) -> PhaseConfig:
        """Steps, batch size and learning rate."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RecipeSettings:
    """Shared groups of section `train`, the hardware, and the folders that models are read from."""

    seed: int
    resolution: int
    audio: AudioEncodingConfig
    image_augmentation: ImageAugmentationConfig
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    max_nonfinite_steps: int
    setup: DistributedSetup
    root: Path
    assets: Path


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """Data of a run and access to its feature stores.

    Attributes:
        digest: identity of the run.
        pairs: pair rows by split, `train` and `val`, with image id, tracks and split.
        features: encoded augmentations by clip, the first of the clip itself; read from disk at each access.
        encoder: audio encoder that made them.
        image: RGB uint8 [H, W, 3] by image id.
        open_store: feature store of a fingerprint and its columns.
    """

    digest: str
    pairs: Mapping[str, list[dict[str, Any]]]
    features: StoredClips
    encoder: AudioTokenizer
    image: Callable[[str], ByteArray]
    open_store: Callable[[str, Sequence[str]], FeatureStore]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Parts of a run.

    Attributes:
        module: what is trained.
        datamodule: its batches.
        sample_grid: generate the sample grid uint8 [H, W, 3] with the present weights.
        export: write the model into a new folder.
    """

    module: DiffusionModule
    datamodule: AudioImageDataModule
    sample_grid: Callable[[], ByteArray]
    export: Callable[[Path], None]


class Recipe(ABC):
    """A way to train a model. A subclass registers in `RECIPES`.

    Args:
        config: group of the recipe.
        settings: shared settings.

    Attributes:
        config_class: model of the group.
    """

    config_class: ClassVar[type[RecipeConfig]]

    def __init__(self, config: Any, settings: RecipeSettings) -> None:
        self.config = config
        self.settings = settings

    def describe(self) -> Any:
        """Identity of the recipe's frozen models, for the digest of the run."""
        return None

    @abstractmethod
    def prepare(self, inputs: TrainingInputs) -> TrainingRun:
        """Load the frozen models, encode the data and build what is trained."""
