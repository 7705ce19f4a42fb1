"""Sampling during training: defaults saved with the model, and the sample grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.diffusion.pipelines.base import AudioConditionedPipeline, GenerationConfig
from pipeline_steps.train.recipes.base import RecipeSettings

GRID_CLIPS = 8
GRID_SAMPLES = 2


def generation_config(settings: RecipeSettings) -> GenerationConfig:
    """Default sampling parameters saved with the model."""
    return GenerationConfig(
        num_inference_steps=settings.sampling.num_inference_steps,
        guidance_scale=settings.sampling.guidance_scale,
        max_seconds=settings.audio.max_seconds,
        resolution=settings.resolution,
    )


def sample_grid(pipeline: AudioConditionedPipeline, embeds: Callable[[int], Any], count: int, seed: int) -> ByteArray:
    """Sample grid uint8 [H, W, 3]: one column for each of the first pairs' clips."""
    images = pipeline.generate_batch([embeds(row) for row in range(min(GRID_CLIPS, count))], GRID_SAMPLES, seed=seed)
    return np.concatenate([np.concatenate(list(column), axis=0) for column in images], axis=1)
