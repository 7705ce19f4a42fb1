"""Judge `clip`: image encoder of a CLIP (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import Any

from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES
from pipeline_steps.evaluate.judges.hub_vision_model import TransformersImageEncoder


@IMAGE_JUDGES.register("clip")
class ClipImageEncoder(TransformersImageEncoder):
    """Images to projected image embeddings, the features of CMMD (Jayasumana et al. 2024, arXiv 2401.09603).

    Accepts a checkpoint of `CLIPModel` or of its vision model with projection.
    """

    name = "clip"
    family = "clip"
    version = 1
    model_types = ("clip", "clip_vision_model")
    output = "image_embeds"

    def network_class(self) -> Any:
        """`CLIPVisionModelWithProjection`, which skips the text encoder of a whole CLIP."""
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection
