"""Lookup baseline: the training images whose audio is nearest to a clip in the retrieval space. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline_steps.audio.mixing import Tracks, pair_tracks
from pipeline_steps.core.array_types import DoubleArray, FloatArray
from pipeline_steps.evaluate.evaluation_plan import EvaluationPlan

TIE = 1e-6
"""Difference of cosines up to which two training clips are equally near."""


def nearest_training_images(plan: EvaluationPlan, audio_vectors: Mapping[str, FloatArray]) -> list[tuple[str, ...]]:
    """Image ids of the nearest training pair of each clip of the plan; several if pairs have the same nearest clip.

    A clip with a track without embedding has no nearest image.

    Args:
        plan: clips and training pairs.
        audio_vectors: unit embedding of the stage `embed` by audio id.
    """
    trained = [(str(pair["image_id"]), mix_vector(pair_tracks(pair), audio_vectors)) for pair in plan.training_pairs]
    known = [(image_id, vector) for image_id, vector in trained if vector is not None]
    if not known:
        return [() for _ in plan.clips]
    matrix = np.stack([vector for _, vector in known])
    found = []
    for clip in plan.clips:
        vector = mix_vector(clip.tracks, audio_vectors)
        cosines = np.full(len(known), -np.inf) if vector is None else matrix @ vector
        best = cosines.max()
        near = np.flatnonzero((cosines >= best - TIE) & np.isfinite(cosines))
        found.append(tuple(sorted({known[row][0] for row in near})))
    return found


def mix_vector(tracks: Tracks, audio_vectors: Mapping[str, FloatArray]) -> DoubleArray | None:
    """Unit embedding of a mixture: the mean of its tracks, weighted by their gains; None if a track has no embedding."""
    if not tracks or any(audio_id not in audio_vectors for audio_id, _ in tracks):
        return None
    total = sum(10.0 ** (gain / 20.0) * audio_vectors[audio_id].astype(np.float64) for audio_id, gain in tracks)
    norm = float(np.linalg.norm(total))
    return np.asarray(total / norm) if norm > 0 else None
