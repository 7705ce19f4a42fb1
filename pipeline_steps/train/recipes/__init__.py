"""Training recipes: one folder each, which registers a subclass of `Recipe` in its `__init__.py`."""

from pipeline_steps.core.registry import Registry
from pipeline_steps.train.recipes.base import Recipe

RECIPES: Registry[type[Recipe]] = Registry("recipe", "pipeline_steps.train.recipes")
