"""Section `train` of params.yaml."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.train.config_groups import (
    AudioEncodingConfig,
    ImageAugmentationConfig,
    OptimizerConfig,
    PerformanceConfig,
    SamplingConfig,
    SceneConfig,
)
from pipeline_steps.train.recipes import RECIPES


class TrainConfig(StageConfig):
    """Train an audio-to-image diffusion model. The keys of a recipe are in the group with its name."""

    registries: ClassVar = {"recipe": RECIPES}

    recipe: str = Field(
        default="ip_adapter", description="ip_adapter: audio adapter of a frozen text-to-image backbone, or an installed one"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="seed of everything random in the stage")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU if there is one")
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        default="auto", description="auto: 32-true on CPU, bf16-mixed on GPU"
    )
    num_threads: int = Field(default=0, ge=0, le=1024, description="CPU threads; 0: torch's default")
    resolution: int = Field(default=64, ge=16, le=1024, multiple_of=16, description="px, side of generated images")
    audio: AudioEncodingConfig = AudioEncodingConfig()
    image_augmentation: ImageAugmentationConfig = ImageAugmentationConfig()
    scenes: SceneConfig = SceneConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sampling: SamplingConfig = SamplingConfig()
    performance: PerformanceConfig = PerformanceConfig()
    checkpointing_steps: int = Field(default=100, ge=1, description="steps between checkpoints")
    validation_steps: int = Field(default=100, ge=1, description="steps between validations (loss and sample grid)")
    max_nonfinite_steps: int = Field(
        default=3, ge=1, le=1000, description="consecutive steps with a loss that is not finite before training stops"
    )
    resume_from_checkpoint: str | None = Field(default=None, description="checkpoint to resume from; null: the run's own")

    @property
    def recipe_config(self) -> Any:
        """Group of the selected recipe."""
        return self.implementation_config(self.recipe)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.audio.encoder == "ast" and not self.audio.ast.model:
            raise ValueError("audio.ast.model is empty; audio.encoder ast requires a hub id or a folder")
        return self
