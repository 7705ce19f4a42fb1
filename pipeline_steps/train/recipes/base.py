"""Interface of a training recipe: its configuration, its frozen models and the parts that the training loop needs.

This module and the `__init__.py` of a recipe's folder do not import torch, because they are imported to validate parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
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
    import pyarrow as pa

    from pipeline_steps.audio.mixing import Tracks
    from pipeline_steps.core.array_types import ByteArray
    from pipeline_steps.core.result_cache import ResultCache
    from pipeline_steps.diffusion.audio_tokens import AudioTokenizer
    from pipeline_steps.train.data import AudioImageDataModule
    from pipeline_steps.train.distributed import DistributedSetup
    from pipeline_steps.train.lightning_module import DiffusionModule


class RecipeConfig(StageConfig):
    """Base of the configuration of a recipe."""

    @property
    def training_phases(self) -> Mapping[str, PhaseConfig]:
        """Phases in their order, by their key in group `phases`."""
        raise NotImplementedError

    @property
    def max_steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.max_steps for phase in self.training_phases.values())

    def check(
        self,
        resolution: int,
        audio: AudioEncodingConfig,
        image_augmentation: ImageAugmentationConfig,
        sampling: SamplingConfig,
    ) -> None:
        """Check the recipe's keys against the shared ones; called if the recipe is selected.

        Raises:
            ValueError: a combination of keys is not supported.
        """


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
    """Data of a run and access to its caches.

    Attributes:
        digest: identity of the run.
        pairs: pair rows by split, `train` and `val`.
        features: encoded augmentations by clip, the first of the clip itself.
        encoder: audio encoder that made them.
        image: RGB uint8 [H, W, 3] by image id.
        open_cache: result cache of a fingerprint and a schema.
        load_or_train: weights file of the run by name: loaded into `build()` if an earlier attempt saved it, else made by
            `train()` and saved.
    """

    digest: str
    pairs: Mapping[str, list[dict[str, Any]]]
    features: Mapping[Tracks, list[Any]]
    encoder: AudioTokenizer
    image: Callable[[str], ByteArray]
    open_cache: Callable[[str, pa.Schema], ResultCache]
    load_or_train: Callable[[str, Callable[[], Any], Callable[[], Any]], Any]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Parts of a run.

    Attributes:
        module: what is trained.
        datamodule: its batches.
        sample_grid: generate the sample grid uint8 [H, W, 3] with the present weights.
        export: write the model into a new folder.
        metrics: metrics of the data and the frozen parts.
    """

    module: DiffusionModule
    datamodule: AudioImageDataModule
    sample_grid: Callable[[], ByteArray]
    export: Callable[[Path], None]
    metrics: dict[str, Any]


class Recipe(ABC):
    """A way to train a model. A subclass registers in `RECIPES`.

    Args:
        config: group of the recipe.
        settings: shared settings.

    Attributes:
        config_class: model of the group.
        features: what a clip is encoded as: `frames` (YAMNet's frames and logits) or `tokens` (grids of encoder tokens).
        min_clips: distinct training clips that are required.
    """

    config_class: ClassVar[type[RecipeConfig]]
    features: ClassVar[str] = "frames"
    min_clips: ClassVar[int] = 1

    def __init__(self, config: Any, settings: RecipeSettings) -> None:
        self.config = config
        self.settings = settings

    def describe(self) -> Any:
        """Identity of the recipe's frozen models, for the digest of the run."""
        return None

    @abstractmethod
    def prepare(self, inputs: TrainingInputs) -> TrainingRun:
        """Fit the fixed parts and build what is trained."""
