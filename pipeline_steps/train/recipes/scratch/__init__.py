"""Recipe `scratch`: a small model trained on the pairs alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_steps.train.recipes import RECIPES
from pipeline_steps.train.recipes.base import Recipe
from pipeline_steps.train.recipes.scratch.config import ScratchConfig

if TYPE_CHECKING:
    from pipeline_steps.train.recipes.base import TrainingInputs, TrainingRun


@RECIPES.register("scratch")
class ScratchRecipe(Recipe):
    """Autoencoder, audio conditioner and denoiser, all trained from scratch."""

    config_class = ScratchConfig
    min_clips = 2

    def prepare(self, inputs: TrainingInputs) -> TrainingRun:
        """Fit the fixed parts and build the denoiser."""
        from pipeline_steps.train.recipes.scratch.training import prepare

        return prepare(self.config, self.settings, inputs)
