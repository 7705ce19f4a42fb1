"""Audio features for training: augment each clip, extract encoder features, cache them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline_steps.audio.mixing import Tracks, mix_tracks, pair_tracks
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
from pipeline_steps.diffusion.audio_tokens import AstTokenizer, AudioTokenizer, AudioTokens, YamnetTokenizer
from pipeline_steps.models.audio.ast import AstEncoder
from pipeline_steps.models.audio.yamnet import SAMPLE_RATE, YamNet
from pipeline_steps.train.augmentations import AUGMENT_VERSION, NUM_ROOMS, augment_audio
from pipeline_steps.train.config_groups import AudioEncodingConfig

FEATURES_SCHEMA = pa.schema(
    [pa.field("frames", pa.binary()), pa.field("logits", pa.binary()), pa.field("level", pa.list_(pa.float32()))]
)
TOKENS_SCHEMA = pa.schema([pa.field("grid", pa.binary()), pa.field("tags", pa.binary()), pa.field("loudness", pa.float64())])
WAVEFORM_CACHE_SIZE = 256
"""Preprocessed waveforms kept in memory. The augmentations of a clip follow each other; clips to mix in come in any order."""
MIX_POOL_SIZE = 256
"""Clips that may be mixed into augmentations: those with the smallest ids.

Ids are content hashes, so this is a random sample, and adding a clip changes at most one member.
"""
GAIN_DECIMALS = 3
"""Gains of clips are compared and cached with so many decimals."""


def clip_of(pair: dict[str, Any]) -> Tracks:
    """Clip of a pair: its tracks with rounded gains."""
    return pair_tracks(pair, GAIN_DECIMALS)


def distinct_clips(rows: Iterable[dict[str, Any]]) -> list[Tracks]:
    """Distinct clips of pairs, sorted."""
    return sorted({clip_of(row) for row in rows})


def mix_partner(tracks: Tracks, augmentation: int, pool: list[Tracks]) -> Tracks:
    """Clip of the sorted pool that an augmentation may mix in; empty for the clip itself (augmentation 0).

    It is chosen by rendezvous hashing among the first `MIX_POOL_SIZE`, so that a new clip changes few choices.
    """
    others = [other for other in pool[:MIX_POOL_SIZE] if other != tracks] if augmentation else []
    return min(others, key=lambda other: fingerprint([tracks, augmentation, other]), default=())


def features_to_row(features: AudioFeatures) -> dict[str, Any]:
    """Cache row of features, in half precision."""
    return {
        "frames": features.frames.half().numpy().tobytes(),
        "logits": features.logits.half().numpy().tobytes(),
        "level": features.level.tolist(),
    }


def row_to_features(row: dict[str, Any]) -> AudioFeatures:
    """Features of a cache row. New features are converted too, so that cached and new ones are equal."""
    frames = np.frombuffer(row["frames"], np.float16).reshape(-1, FEATURE_WIDTH)
    logits = np.frombuffer(row["logits"], np.float16).reshape(-1, TAGS)
    return AudioFeatures(
        torch.from_numpy(frames.copy()).float(),
        torch.from_numpy(logits.copy()).float(),
        torch.tensor(row["level"], dtype=torch.float32),
    )


@dataclass(frozen=True, slots=True)
class AudioFeatureSpec:
    """How features of clips are extracted and cached.

    Attributes:
        identity: everything except the clip and its augmentation that determines the features.
        schema: of a cache row.
        preprocess: mono 48 kHz clip [T] -> waveform that is augmented.
        extract: waveforms -> cache rows, one each.
        read: cache row -> features.
        rate: of the preprocessed waveform, Hz.
        batch_size: waveforms per call of `extract`.
        rows_per_part: rows written to the cache at once.
    """

    identity: dict[str, Any]
    schema: pa.Schema
    preprocess: Callable[[FloatArray], FloatArray]
    extract: Callable[[list[FloatArray]], list[dict[str, Any]]]
    read: Callable[[dict[str, Any]], Any]
    rate: int
    batch_size: int = 1
    rows_per_part: int = 256


def build_tokenizer(audio: AudioEncodingConfig, assets: Path, root: Path, device: str) -> AudioTokenizer:
    """Audio encoder that the configuration selects; its weights are not loaded yet."""
    tagger = YamNet(assets)
    if audio.encoder == "ast":
        return AstTokenizer(AstEncoder(audio.ast.model, audio.ast.revision, device, audio.ast.dtype, root=root), tagger)
    return YamnetTokenizer(tagger, tagger)


def frames_feature_spec(encoder: YamNet, max_seconds: float) -> AudioFeatureSpec:
    """YAMNet's frames and logits. One clip per call."""
    return AudioFeatureSpec(
        identity={"encoder": encoder.describe(), "features": FEATURES_VERSION},
        schema=FEATURES_SCHEMA,
        preprocess=lambda samples: preprocess_waveform(samples, max_seconds),
        extract=lambda waveforms: [features_to_row(extract_audio_features(encoder, waveform)) for waveform in waveforms],
        read=row_to_features,
        rate=SAMPLE_RATE,
    )


def tokens_feature_spec(tokenizer: AudioTokenizer, max_seconds: float) -> AudioFeatureSpec:
    """Tokens of an audio encoder, in half precision."""

    def extract(waveforms: list[FloatArray]) -> list[dict[str, Any]]:
        return [
            {
                "grid": tokens.grid.numpy().tobytes(),
                "tags": tokens.tags.half().numpy().tobytes(),
                "loudness": round(tokens.loudness, 3),
            }
            for tokens in tokenizer.encode(waveforms)
        ]

    def read(row: dict[str, Any]) -> AudioTokens:
        grid = torch.from_numpy(np.frombuffer(row["grid"], np.float16).copy()).view(-1, tokenizer.bands, tokenizer.width)
        return AudioTokens(grid, torch.from_numpy(np.frombuffer(row["tags"], np.float16).astype(np.float32)), row["loudness"])

    return AudioFeatureSpec(
        identity={"encoder": tokenizer.describe()},
        schema=TOKENS_SCHEMA,
        preprocess=lambda samples: tokenizer.prepare(samples, max_seconds),
        extract=extract,
        read=read,
        rate=tokenizer.rate,
        batch_size=16,
        rows_per_part=64,
    )


def feature_spec_for(tokenizer: AudioTokenizer, max_seconds: float, tokens: bool) -> AudioFeatureSpec:
    """Feature spec of an audio encoder; loads its weights."""
    tokenizer.encoder.load()
    return tokens_feature_spec(tokenizer, max_seconds) if tokens else frames_feature_spec(tokenizer.encoder, max_seconds)


def cache_fingerprint(audio: AudioEncodingConfig, seed: int, spec: AudioFeatureSpec) -> str:
    """Fingerprint of the cache of augmented features."""
    rooms = {"rooms": ROOMS_VERSION} if audio.reverb_prob else {}
    identity = {"augment": AUGMENT_VERSION, "seed": seed, "sound": audio.augmentation_identity()}
    return fingerprint({**spec.identity, **identity, **rooms})


def load_or_extract_features(
    audio: AudioEncodingConfig,
    seed: int,
    spec: AudioFeatureSpec,
    cache: ResultCache,
    read_audio: Callable[[str], FloatArray],
    rows: list[dict[str, Any]],
) -> tuple[dict[Tracks, list[Any]], int, int]:
    """Features of every augmentation of every clip, the first of the clip itself.

    Args:
        audio: encoder and augmentation.
        seed: of the augmentation.
        spec: how features are extracted.
        cache: of the schema and fingerprint of the spec.
        read_audio: samples [T] of a mono 48 kHz clip by id.
        rows: pairs; clips of split `train` may be mixed into others.

    Returns:
        features by clip, one item per augmentation; augmentations computed; augmentations found in the cache.
    """
    clips = distinct_clips(rows)
    pool = distinct_clips(row for row in rows if row["split"] == "train")
    items = [
        (tracks, number, mix_partner(tracks, number, pool)) for tracks in clips for number in range(audio.num_augmentations)
    ]
    keys = {(tracks, number): fingerprint([tracks, number, other]) for tracks, number, other in items}
    cached = cache.load(keys.values())
    missing = [item for item in items if keys[item[0], item[1]] not in cached]
    impulse_responses: list[FloatArray] = []
    if audio.reverb_prob and missing:
        impulse_responses = simulate_room_impulse_responses(NUM_ROOMS, spec.rate, seed)

    @lru_cache(maxsize=WAVEFORM_CACHE_SIZE)
    def waveform(tracks: Tracks) -> FloatArray:
        return spec.preprocess(mix_tracks([(read_audio(audio_id), gain_db) for audio_id, gain_db in tracks]))

    def augmented(tracks: Tracks, number: int, other: Tracks) -> FloatArray:
        if not number:
            return waveform(tracks)
        rng = seeded_rng(seed, "view", keys[tracks, number])
        return augment_audio(waveform(tracks), waveform(other) if other else None, audio, rng, impulse_responses)

    new: dict[str, dict[str, Any]] = {}
    for start in range(0, len(missing), spec.batch_size):
        chunk = missing[start : start + spec.batch_size]
        extracted = spec.extract([augmented(*item) for item in chunk])
        new |= {keys[tracks, number]: row for (tracks, number, _), row in zip(chunk, extracted, strict=True)}
        if len(new) >= spec.rows_per_part:
            cache.append(new)
            cached |= new
            new = {}
    cache.append(new)
    cached |= new
    features = {
        tracks: [spec.read(cached[keys[tracks, number]]) for number in range(audio.num_augmentations)] for tracks in clips
    }
    return features, len(missing), len(items) - len(missing)
