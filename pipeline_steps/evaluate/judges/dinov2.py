"""Judge `dinov2`: pictures learned without labels or texts (Oquab et al. 2023, arXiv 2304.07193)."""

from __future__ import annotations

from typing import Any

from pipeline_steps.evaluate.judges.hub_vision_model import TransformersImageEncoder


class Dinov2(TransformersImageEncoder):
    """Pictures -> the class token after the last norm, as in dgm-eval (Stein et al. 2023, arXiv 2306.04675)."""

    name = "dinov2"
    family = "dinov2"
    version = 1
    model_types = ("dinov2", "dinov2_with_registers")
    output = "pooler_output"

    def network_class(self) -> Any:
        """Dinov2Model, also with registers."""
        from transformers import AutoModel

        return AutoModel
