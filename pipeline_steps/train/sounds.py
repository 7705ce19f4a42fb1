"""Sounds of pairs as keys, and their features as rows of the memo."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline_steps.core.identity import fingerprint
from pipeline_steps.diffusion.features import FEATURE_WIDTH, TAGS, SoundFeatures

FEATURES_SCHEMA = pa.schema(
    [pa.field("frames", pa.binary()), pa.field("logits", pa.binary()), pa.field("level", pa.list_(pa.float32()))]
)
Tracks = tuple[tuple[str, float], ...]
"""Audio id and gain in dB of each track of a pair."""


def tracks_of(row: dict[str, Any]) -> Tracks:
    """The sound of a pair."""
    return tuple((track["audio_id"], round(float(track["gain_db"]), 3)) for track in row["tracks"])


def distinct_sounds(rows: Iterable[dict[str, Any]]) -> list[Tracks]:
    """Every sound of some pairs once, sorted."""
    return sorted({tracks_of(row) for row in rows})


def companion(tracks: Tracks, view: int, background: list[Tracks]) -> Tracks:
    """The sound that a view may mix in: by rendezvous hashing, so that a new sound changes few of these choices."""
    others = [other for other in background if other != tracks] if view else []
    return min(others, key=lambda other: fingerprint([tracks, view, other]), default=())


def features_row(features: SoundFeatures) -> dict[str, Any]:
    """Features as the memo keeps them: half precision."""
    return {
        "frames": features.frames.half().numpy().tobytes(),
        "logits": features.logits.half().numpy().tobytes(),
        "level": features.level.tolist(),
    }


def features_of(row: dict[str, Any]) -> SoundFeatures:
    """Features as the memo keeps them (half precision); fresh ones take the same way, so that both are equal."""
    frames = np.frombuffer(row["frames"], np.float16).reshape(-1, FEATURE_WIDTH)
    logits = np.frombuffer(row["logits"], np.float16).reshape(-1, TAGS)
    return SoundFeatures(
        torch.from_numpy(frames.copy()).float(),
        torch.from_numpy(logits.copy()).float(),
        torch.tensor(row["level"], dtype=torch.float32),
    )
