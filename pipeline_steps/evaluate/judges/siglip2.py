"""Judge `siglip2`: image encoder of a SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786), and its text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES
from pipeline_steps.evaluate.judges.hub_vision_model import TransformersImageEncoder

PROMPT = "this is a photo of {}."
"""Prompt of SigLIP 2's zero-shot classification; texts are in lower case, as in training."""
TOKENS = 64
"""Length to which texts are padded, as in training."""


@IMAGE_JUDGES.register("siglip2")
class Siglip2(TransformersImageEncoder):
    """Images to pooled image embeddings; names of classes to text embeddings of the same space.

    Accepts checkpoints of fixed resolution (`model_type` siglip, as `google/siglip2-base-patch16-224`) and of any (siglip2).
    """

    name = "siglip2"
    family = "siglip"
    version = 1
    model_types = ("siglip", "siglip2")
    output = "pooler_output"

    _tokenizer: Any = None

    def network_class(self) -> Any:
        """`AutoModel`: SiglipModel or Siglip2Model."""
        from transformers import AutoModel

        return AutoModel

    def load(self) -> Self:
        """Load image processor, tokenizer and weights; a second call does nothing.

        Raises:
            IntegrityError: no usable image processor or tokenizer, or weights are missing.
        """
        if self._network is None:
            from transformers import AutoTokenizer

            folder: Path = self.fetch()
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except (ImportError, OSError, ValueError, TypeError, KeyError) as error:
                reason = f"{self.key}.model: no usable tokenizer: {' '.join(str(error).split())[:200]}"
                raise IntegrityError(reason, "fetch the checkpoint again, with its tokenizer.json") from error
            super().load()
        return self

    @torch.inference_mode()
    def _forward(self, images: list[ByteArray]) -> torch.Tensor:
        from PIL import Image

        self.load()
        inputs = self._processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            read = self._network.get_image_features(**{name: value.to(self.device) for name, value in inputs.items()})
        features: torch.Tensor = read.pooler_output
        return features

    @torch.inference_mode()
    def class_features(self, names: Sequence[str]) -> FloatArray:
        """Rows [N, D] of prompts with the names of classes, in the space of `features`; one at a time."""
        self.load()
        rows = []
        for name in names:
            text = PROMPT.format(name.lower())
            ids = self._tokenizer(text, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")[
                "input_ids"
            ]
            with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
                rows.append(self._network.get_text_features(ids.to(self.device)).pooler_output[0].float().cpu().numpy())
        return np.stack(rows)
