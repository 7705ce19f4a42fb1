"""Recipe `ip_adapter`: audio conditioning of a frozen text-to-image backbone."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from pipeline_steps.train.recipes import RECIPES
from pipeline_steps.train.recipes.base import Recipe
from pipeline_steps.train.recipes.ip_adapter.config import IPAdapterConfig

if TYPE_CHECKING:
    from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
    from pipeline_steps.train.recipes.base import TrainingInputs, TrainingRun


@RECIPES.register("ip_adapter")
class IPAdapterRecipe(Recipe):
    """Resampler and decoupled cross-attention of a frozen backbone."""

    config_class = IPAdapterConfig

    @cached_property
    def backbone(self) -> StableDiffusionBackbone:
        """Backbone; its weights are not loaded yet."""
        from pipeline_steps.train.recipes.ip_adapter.training import build_backbone

        return build_backbone(self.config.backbone, self.settings)

    def describe(self) -> Any:
        """Identity of the backbone."""
        return {"backbone": self.backbone.describe()}

    def prepare(self, inputs: TrainingInputs) -> TrainingRun:
        """Load the backbone, encode the images, and build the adapter."""
        from pipeline_steps.train.recipes.ip_adapter.training import prepare

        return prepare(self.config, self.settings, inputs, self.backbone)
