"""Judge `clip`: the image tower of a CLIP (Radford et al. 2021, arXiv 2103.00020)."""

from __future__ import annotations

from typing import Any

from pipeline_steps.evaluate.judges.hub_vision_model import TransformersImageEncoder


class ClipImageEncoder(TransformersImageEncoder):
    """Pictures -> the projected image embedding, which is what CMMD is defined on (Jayasumana et al. 2024, arXiv 2401.09603).

    Takes a whole CLIPModel checkpoint or an image tower with its projection.
    """

    name = "clip"
    family = "clip"
    version = 1
    model_types = ("clip", "clip_vision_model")
    output = "image_embeds"

    def network_class(self) -> Any:
        """CLIPVisionModelWithProjection: of a whole CLIP, the text tower is not read."""
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection
