"""Known-answer check of a text-audio encoder: texts of unlike sounds have unlike vectors.

Some published checkpoints load without an error and encode all texts as almost the same vector.
"""

from __future__ import annotations

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.errors import IntegrityError

TEXTS = (
    "a dog barking",
    "rain on a tin roof",
    "a church bell ringing",
    "an engine idling",
    "waves breaking on a beach",
    "a crowd applauding",
    "a baby crying",
    "a violin playing",
)
MAX_MEAN_COSINE = 0.99
"""Largest accepted mean over the pairs of `TEXTS`. A working CLAP has about 0.3, a broken published checkpoint 0.9993."""


def check_text_vectors(vectors: FloatArray, model: str) -> None:
    """Check the unit vectors [N, D] of `TEXTS` by `model`.

    Raises:
        IntegrityError: they hardly differ, or are not finite.
    """
    pairs = (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]
    mean = float(pairs.mean())
    if mean <= MAX_MEAN_COSINE:  # false for NaN
        return
    raise IntegrityError(
        f"embed.encoder: {model} does not distinguish texts: {len(vectors)} texts of unlike sounds have a mean cosine of "
        f"{mean:.4f} (smallest {float(pairs.min()):.4f}, {MAX_MEAN_COSINE:g} is the largest accepted mean)",
        "choose another checkpoint; the weights are damaged, or were published wrongly",
    )
