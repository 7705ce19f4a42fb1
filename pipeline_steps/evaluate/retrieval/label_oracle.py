"""Label oracle of the retrieval table: class names encoded by the encoder of the embeddings on disk."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.models.text_audio.base import recorded_encoder

log = logging.getLogger(__name__)

Row = dict[str, Any]


def label_vectors(
    layout: ProjectPaths, cache_url: str, meta: Row, labels: list[str], probe: str, expected: FloatArray
) -> dict[str, FloatArray] | None:
    """Unit vectors of class names as texts, by label; None and a warning if the encoder cannot be rebuilt.

    Args:
        cache_url: result cache that may hold an artifact of the encoder.
        meta: `meta.json` of the embeddings: encoder and parameters.
        labels: class names.
        probe, expected: a text of the embeddings and its vector, which check the rebuilt encoder.

    Raises:
        IntegrityError: the rebuilt encoder returns another vector for `probe`.
    """
    parameters = meta.get("parameters")
    if not isinstance(parameters, dict):
        log.warning("embeddings/meta.json has no parameters: the label-oracle row is left out")
        return None
    encoder = recorded_encoder(meta).from_parameters(parameters, layout)
    if encoder is None:
        log.warning("the checkpoint of the embeddings lies outside the project: the label-oracle row is left out")
        return None
    encoder.load()
    if artifact := encoder.text_artifact():
        artifact.restore(cache_url)
    if np.abs(encoder.encode_texts([probe])[0] - expected).max() > encoder.rebuild_tolerance:
        raise IntegrityError(f"{layout.embeddings} was made by another version of the encoder", "run: dvc repro --force embed")
    return dict(zip(labels, encoder.encode_texts(labels), strict=True))
