"""The label oracle of the retrieval table: class names as texts of the very space that the embeddings on disk lie in."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.evaluate.judges.feature_extractors import CachedFeatures, CacheFactory
from pipeline_steps.models.base import TextAudioEncoder
from pipeline_steps.models.text_audio.yamnet_minilm import YamnetMiniLMEncoder

log = logging.getLogger(__name__)

Row = dict[str, Any]


def label_vectors(
    layout: ProjectPaths, open_memo: CacheFactory, meta: Row, labels: list[str], probe: str, expected: FloatArray
) -> dict[str, FloatArray] | None:
    """Class names as texts of the space on disk: label -> unit vector; None (and a log line) if the space cannot be rebuilt.

    Args:
        meta: `meta.json` of the embeddings: which encoder, with which parameters.
        labels: class names.
        probe, expected: a text of the space and its vector, by which the rebuilt encoder is checked.

    Raises:
        IntegrityError: the encoder, as it is now, gives another vector.
    """
    parameters = meta.get("parameters")
    if not isinstance(parameters, dict):
        log.warning("embeddings/meta.json names no parameters: the label-oracle row is left out")
        return None
    encoder: TextAudioEncoder
    if meta.get("encoder") in ("clap", "laion"):
        if not parameters:
            log.warning("the embeddings' checkpoint lies outside the project: the label-oracle row is left out")
            return None
        encoder, tolerance = _clap(layout, str(meta["encoder"]), parameters), 1e-2  # bfloat16 on another GPU rounds elsewhere
    else:
        encoder, tolerance = _bridge(layout, open_memo, parameters), 1e-3
    if np.abs(encoder.encode_texts([probe])[0] - expected).max() > tolerance:
        raise IntegrityError(f"{layout.embeddings} was made by another version of the encoder", "run: dvc repro --force embed")
    return dict(zip(labels, encoder.encode_texts(labels), strict=True))


def _bridge(layout: ProjectPaths, open_memo: CacheFactory, parameters: Row) -> YamnetMiniLMEncoder:
    encoder = YamnetMiniLMEncoder(layout.assets, **parameters).load()
    tags = CachedFeatures(open_memo("embed-tags", encoder.describe_tags()), 1)  # the embed stage keeps them there
    flat = tags.rows(["tags"], lambda _: encoder.tag_vectors().reshape(1, -1))["tags"]
    encoder.set_tag_embeddings(flat.astype(np.float32).reshape(-1, encoder.minilm.dimension))
    return encoder


def _clap(layout: ProjectPaths, name: str, parameters: Row) -> TextAudioEncoder:
    from pipeline_steps.models.text_audio.clap import ClapEncoder
    from pipeline_steps.models.text_audio.laion_clap import LaionClapEncoder

    return (LaionClapEncoder if name == "laion" else ClapEncoder)(**parameters, root=layout.root).load()
