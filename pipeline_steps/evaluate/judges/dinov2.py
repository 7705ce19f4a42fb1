"""Judge `dinov2`: self-supervised vision transformer DINOv2 (Oquab et al. 2023, arXiv 2304.07193)."""

from __future__ import annotations

from typing import Any

from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES
from pipeline_steps.evaluate.judges.hub_vision_model import TransformersImageEncoder


@IMAGE_JUDGES.register("dinov2")
class Dinov2(TransformersImageEncoder):
    """Images to class tokens after the last norm, as in dgm-eval (Stein et al. 2023, arXiv 2306.04675)."""

    name = "dinov2"
    family = "dinov2"
    version = 1
    model_types = ("dinov2", "dinov2_with_registers")
    output = "pooler_output"

    def network_class(self) -> Any:
        """`AutoModel`, which loads checkpoints with and without registers."""
        from transformers import AutoModel

        return AutoModel
