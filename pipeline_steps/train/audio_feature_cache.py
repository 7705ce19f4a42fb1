"""Sounds of pairs as keys, their views, and what an encoder hears in them as rows of the memo."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline_steps.audio.mixing import mix_tracks
from pipeline_steps.audio.reverb import ROOMS_VERSION, simulate_room_impulse_responses
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.diffusion.audio_features import (
    FEATURE_WIDTH,
    FEATURES_VERSION,
    TAGS,
    AudioFeatures,
    extract_audio_features,
    preprocess_waveform,
)
from pipeline_steps.diffusion.audio_tokens import AstTokenizer, GridEncoder, yamnet_tokens
from pipeline_steps.models.audio.ast import STORED_RATE
from pipeline_steps.models.audio.yamnet import SAMPLE_RATE, YamNet
from pipeline_steps.train.augmentations import AUGMENT_VERSION, ROOMS, augment_audio
from pipeline_steps.train.config import TrainConfig

FEATURES_SCHEMA = pa.schema(
    [pa.field("frames", pa.binary()), pa.field("logits", pa.binary()), pa.field("level", pa.list_(pa.float32()))]
)
GRID_SCHEMA = pa.schema([pa.field("grid", pa.binary())])
WAVEFORMS_KEPT = 256
"""Prepared waveforms in memory: a sound's views come one after another, sounds that are mixed in from anywhere."""
COMPANIONS = 256
"""Training sounds that may be mixed into views: in larger pools those of the smallest ids. An id is a hash of content, so they
are a fair draw of which a new sound displaces one at most, and the choice costs each sound the same whatever the pool."""
Tracks = tuple[tuple[str, float], ...]
"""Audio id and gain in dB of each track of a pair."""


def pair_tracks(row: dict[str, Any]) -> Tracks:
    """The sound of a pair."""
    return tuple((track["audio_id"], round(float(track["gain_db"]), 3)) for track in row["tracks"])


def distinct_sounds(rows: Iterable[dict[str, Any]]) -> list[Tracks]:
    """Every sound of some pairs once, sorted."""
    return sorted({pair_tracks(row) for row in rows})


def mix_partner(tracks: Tracks, view: int, background: list[Tracks]) -> Tracks:
    """The sound of the sorted background that a view may mix in: by rendezvous hashing among the first `COMPANIONS`, so that a
    new sound changes few of these choices."""
    others = [other for other in background[:COMPANIONS] if other != tracks] if view else []
    return min(others, key=lambda other: fingerprint([tracks, view, other]), default=())


def features_to_row(features: AudioFeatures) -> dict[str, Any]:
    """Features as the memo keeps them: half precision."""
    return {
        "frames": features.frames.half().numpy().tobytes(),
        "logits": features.logits.half().numpy().tobytes(),
        "level": features.level.tolist(),
    }


def row_to_features(row: dict[str, Any]) -> AudioFeatures:
    """Features as the memo keeps them (half precision); fresh ones take the same way, so that both are equal."""
    frames = np.frombuffer(row["frames"], np.float16).reshape(-1, FEATURE_WIDTH)
    logits = np.frombuffer(row["logits"], np.float16).reshape(-1, TAGS)
    return AudioFeatures(
        torch.from_numpy(frames.copy()).float(),
        torch.from_numpy(logits.copy()).float(),
        torch.tensor(row["level"], dtype=torch.float32),
    )


@dataclass(frozen=True, slots=True)
class AudioFeatureSpec:
    """How sounds are heard and remembered.

    Attributes:
        mark: everything but the sound, its view and the parameters of views that shapes a result.
        schema: of a result in the memo.
        prepare: mono 48 kHz sound [T] -> the waveform that views are made of.
        hear: such waveforms -> rows of the memo, one each.
        read: a row -> what is trained on.
        rate: of the prepared waveform, Hz.
        together: waveforms that are heard in one call.
        part: rows of a part of the memo.
    """

    mark: dict[str, Any]
    schema: pa.Schema
    prepare: Callable[[FloatArray], FloatArray]
    hear: Callable[[list[FloatArray]], list[dict[str, Any]]]
    read: Callable[[dict[str, Any]], Any]
    rate: int
    together: int = 1
    part: int = 256


def yamnet_feature_spec(encoder: YamNet, max_seconds: float, grids: bool = False) -> AudioFeatureSpec:
    """YAMNet's features, as `SoundFeatures` or as grids; both are remembered alike. One sound a call."""
    return AudioFeatureSpec(
        mark={"encoder": encoder.describe(), "features": FEATURES_VERSION},
        schema=FEATURES_SCHEMA,
        prepare=lambda samples: preprocess_waveform(samples, max_seconds),
        hear=lambda waveforms: [features_to_row(extract_audio_features(encoder, waveform)) for waveform in waveforms],
        read=(lambda row: yamnet_tokens(row_to_features(row))) if grids else row_to_features,
        rate=SAMPLE_RATE,
    )


def ast_feature_spec(encoder: AstTokenizer, max_seconds: float) -> AudioFeatureSpec:
    """Grids of an Audio Spectrogram Transformer, in half precision; views are made of the waveform at 48 kHz."""

    def hear(waveforms: list[FloatArray]) -> list[dict[str, Any]]:
        return [{"grid": grid.numpy().tobytes()} for grid in encoder.grids(waveforms, max_seconds)]

    def read(row: dict[str, Any]) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(row["grid"], np.float16).copy()).view(-1, encoder.bands, encoder.width)

    longest = int(np.ceil(max_seconds * STORED_RATE))
    return AudioFeatureSpec(
        mark={"encoder": encoder.describe()},
        schema=GRID_SCHEMA,
        prepare=lambda samples: samples[:longest],
        hear=hear,
        read=read,
        rate=STORED_RATE,
        together=16,
        part=64,
    )


def feature_spec_for(encoder: GridEncoder, max_seconds: float, grids: bool) -> AudioFeatureSpec:
    """The ear that an encoder is; its weights are loaded."""
    encoder.encoder.load()
    if isinstance(encoder, AstTokenizer):
        return ast_feature_spec(encoder, max_seconds)
    return yamnet_feature_spec(encoder.encoder, max_seconds, grids)


def cache_fingerprint(config: TrainConfig, ear: AudioFeatureSpec) -> str:
    """Fingerprint of the memo that keeps what an ear heard."""
    views = config.sound.identity()
    rooms = {"rooms": ROOMS_VERSION} if config.sound.reverb_share else {}
    return fingerprint({**ear.mark, "augment": AUGMENT_VERSION, "seed": config.seed, "sound": views, **rooms})


def load_or_extract_features(
    config: TrainConfig,
    ear: AudioFeatureSpec,
    memo: ResultCache,
    sound: Callable[[str], FloatArray],
    rows: list[dict[str, Any]],
) -> tuple[dict[Tracks, list[Any]], int, int]:
    """What is heard in every sound's views, the first being the sound itself; remembered by sound and view.

    Args:
        config: the stage's section.
        ear: what hears.
        memo: of the ear's schema and mark.
        sound: samples [T] of a mono 48 kHz sound by id.
        rows: pairs; those of split `train` lend sounds to be mixed in.

    Returns:
        by sound, one reading a view; views computed; views known before.
    """
    part = config.sound
    sounds = distinct_sounds(rows)
    background = distinct_sounds(row for row in rows if row["split"] == "train")
    views = [(tracks, view, mix_partner(tracks, view, background)) for tracks in sounds for view in range(part.views)]
    keys = {(tracks, view): fingerprint([tracks, view, other]) for tracks, view, other in views}
    known = memo.load(keys.values())
    missing = [item for item in views if keys[item[0], item[1]] not in known]
    rooms = simulate_room_impulse_responses(ROOMS, ear.rate, config.seed) if part.reverb_share and missing else []

    @lru_cache(maxsize=WAVEFORMS_KEPT)
    def waveform(tracks: Tracks) -> FloatArray:
        return ear.prepare(mix_tracks([(sound(audio_id), gain_db) for audio_id, gain_db in tracks]))

    def seen(tracks: Tracks, view: int, other: Tracks) -> FloatArray:
        if not view:
            return waveform(tracks)
        rng = seeded_rng(config.seed, "view", keys[tracks, view])
        return augment_audio(waveform(tracks), waveform(other) if other else None, part, rng, rooms)

    fresh: dict[str, dict[str, Any]] = {}
    for start in range(0, len(missing), ear.together):
        chunk = missing[start : start + ear.together]
        made = ear.hear([seen(*item) for item in chunk])
        fresh |= {keys[tracks, view]: row for (tracks, view, _), row in zip(chunk, made, strict=True)}
        if len(fresh) >= ear.part:
            memo.append(fresh)
            known |= fresh
            fresh = {}
    memo.append(fresh)
    known |= fresh
    reused = len(views) - len(missing)
    return (
        {tracks: [ear.read(known[keys[tracks, view]]) for view in range(part.views)] for tracks in sounds},
        len(missing),
        reused,
    )
