"""Audio tokens for training: augment each clip, encode it, cache the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from pipeline_steps.diffusion.audio_tokens import AstTokenizer, AudioTokenizer, AudioTokens, YamnetTokenizer
from pipeline_steps.models.audio.ast import AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.train.augmentations import AUGMENT_VERSION, NUM_ROOMS, augment_audio
from pipeline_steps.train.config_groups import AudioEncodingConfig

TOKENS_SCHEMA = pa.schema([pa.field("grid", pa.binary()), pa.field("tags", pa.binary()), pa.field("loudness", pa.float64())])
BATCH_SIZE = 16
"""Waveforms that are encoded together."""
ROWS_PER_PART = 64
"""Rows written to the cache at once."""
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


def tokens_to_row(tokens: AudioTokens) -> dict[str, Any]:
    """Cache row of a clip, in half precision."""
    return {
        "grid": tokens.grid.numpy().tobytes(),
        "tags": tokens.tags.half().numpy().tobytes(),
        "loudness": round(tokens.loudness, 3),
    }


def row_to_tokens(row: dict[str, Any], bands: int, width: int) -> AudioTokens:
    """Tokens of a cache row. New tokens are converted too, so that cached and new ones are equal."""
    grid = torch.from_numpy(np.frombuffer(row["grid"], np.float16).copy()).view(-1, bands, width)
    return AudioTokens(grid, torch.from_numpy(np.frombuffer(row["tags"], np.float16).astype(np.float32)), row["loudness"])


def build_tokenizer(audio: AudioEncodingConfig, assets: Path, root: Path, device: str) -> AudioTokenizer:
    """Audio encoder that the configuration selects; its weights are not loaded yet."""
    tagger = YamNet(assets)
    if audio.encoder == "ast":
        return AstTokenizer(AstEncoder(audio.ast.model, audio.ast.revision, device, audio.ast.dtype, root=root), tagger)
    return YamnetTokenizer(tagger, tagger)


def cache_fingerprint(audio: AudioEncodingConfig, seed: int, tokenizer: AudioTokenizer) -> str:
    """Fingerprint of the cache of augmented clips."""
    rooms = {"rooms": ROOMS_VERSION} if audio.reverb_prob else {}
    identity = {"augment": AUGMENT_VERSION, "seed": seed, "sound": audio.augmentation_identity()}
    return fingerprint({"encoder": tokenizer.describe(), **identity, **rooms})


def load_or_encode_clips(
    audio: AudioEncodingConfig,
    seed: int,
    tokenizer: AudioTokenizer,
    cache: ResultCache,
    read_audio: Callable[[str], FloatArray],
    rows: list[dict[str, Any]],
) -> tuple[dict[Tracks, list[AudioTokens]], int, int]:
    """Tokens of every augmentation of every clip, the first of the clip itself.

    Args:
        audio: augmentation.
        seed: of the augmentation.
        tokenizer: audio encoder.
        cache: of `TOKENS_SCHEMA` and `cache_fingerprint`.
        read_audio: samples [T] of a mono 48 kHz clip by id.
        rows: pairs; clips of split `train` may be mixed into others.

    Returns:
        tokens by clip, one item per augmentation; augmentations computed; augmentations found in the cache.
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
        impulse_responses = simulate_room_impulse_responses(NUM_ROOMS, tokenizer.rate, seed)

    @lru_cache(maxsize=WAVEFORM_CACHE_SIZE)
    def waveform(tracks: Tracks) -> FloatArray:
        mixed = mix_tracks([(read_audio(audio_id), gain_db) for audio_id, gain_db in tracks])
        return tokenizer.prepare(mixed, audio.max_seconds)

    def augmented(tracks: Tracks, number: int, other: Tracks) -> FloatArray:
        if not number:
            return waveform(tracks)
        rng = seeded_rng(seed, "view", keys[tracks, number])
        return augment_audio(waveform(tracks), waveform(other) if other else None, audio, rng, impulse_responses)

    new: dict[str, dict[str, Any]] = {}
    for start in range(0, len(missing), BATCH_SIZE):
        chunk = missing[start : start + BATCH_SIZE]
        encoded = tokenizer.encode([augmented(*item) for item in chunk])
        new |= {keys[tracks, number]: tokens_to_row(tokens) for (tracks, number, _), tokens in zip(chunk, encoded, strict=True)}
        if len(new) >= ROWS_PER_PART:
            cache.append(new)
            cached |= new
            new = {}
    cache.append(new)
    cached |= new
    bands, width = tokenizer.bands, tokenizer.width
    tokens = {
        tracks: [row_to_tokens(cached[keys[tracks, number]], bands, width) for number in range(audio.num_augmentations)]
        for tracks in clips
    }
    return tokens, len(missing), len(items) - len(missing)
