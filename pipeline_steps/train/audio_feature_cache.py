"""Audio tokens for training: augment each clip, encode it, store the result; tokens are read when they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from pipeline_steps.audio.mixing import Tracks, mix_tracks, pair_tracks
from pipeline_steps.audio.reverb import ROOMS_VERSION, simulate_room_impulse_responses
from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.core.feature_store import FeatureStore, RowNumbers
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.seeding import seeded_rng
from pipeline_steps.diffusion.audio_tokens import AstTokenizer, AudioTokenizer, AudioTokens, TokenPooling, YamnetTokenizer
from pipeline_steps.models.audio.ast import AstEncoder
from pipeline_steps.models.audio.yamnet import YamNet
from pipeline_steps.train.augmentations import AUGMENT_VERSION, NUM_ROOMS, augment_audio
from pipeline_steps.train.config_groups import AudioEncodingConfig

TOKEN_COLUMNS = ("grid", "tags", "loudness")
"""Values of a stored clip: float16 [time, bands, width], float16 [521], float64."""
BATCH_SIZE = 16
"""Waveforms that are encoded together."""
ROWS_PER_PART = 256
"""Rows written to the store at once."""
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
    start = hashlib.sha256(f"[{_canonical(tracks)},{augmentation},".encode())

    def score(other: Tracks) -> bytes:
        """Order of `fingerprint([tracks, augmentation, other])`, with the part that all have in common hashed once."""
        digest = start.copy()
        digest.update(f"{_canonical(other)}]".encode())
        return digest.digest()[:8]

    return min(others, key=score, default=())


@lru_cache(maxsize=2 * MIX_POOL_SIZE)
def _canonical(tracks: Tracks) -> str:
    """JSON of tracks as `fingerprint` writes it."""
    return json.dumps(tracks, separators=(",", ":"), ensure_ascii=False)


def tokens_to_row(tokens: AudioTokens) -> dict[str, bytes]:
    """Stored values of a clip, in half precision."""
    return {
        "grid": tokens.grid.numpy().tobytes(),
        "tags": tokens.tags.half().numpy().tobytes(),
        "loudness": np.float64(round(tokens.loudness, 3)).tobytes(),
    }


@dataclass(frozen=True, slots=True)
class StoredTokens(Sequence[AudioTokens]):
    """Tokens of a clip, one item per augmentation, read from the store at each access."""

    store: FeatureStore
    rows: RowNumbers
    bands: int
    width: int

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> AudioTokens: ...
    @overload
    def __getitem__(self, number: slice) -> list[AudioTokens]: ...
    def __getitem__(self, number: int | slice) -> AudioTokens | list[AudioTokens]:
        if isinstance(number, slice):
            return [self[item] for item in range(len(self))[number]]
        grid, tags, loudness = (self.store.read(int(self.rows[number]), name) for name in TOKEN_COLUMNS)
        return AudioTokens(
            torch.from_numpy(np.frombuffer(grid, np.float16).copy()).view(-1, self.bands, self.width),
            torch.from_numpy(np.frombuffer(tags, np.float16).astype(np.float32)),
            float(np.frombuffer(loudness, np.float64)[0]),
        )


@dataclass(frozen=True, slots=True)
class TokenTable(Sequence[StoredTokens]):
    """Tokens by the number of a clip: an array of row numbers.

    Attributes:
        rows: [clips, augmentations] in the store.
    """

    store: FeatureStore
    rows: RowNumbers
    bands: int
    width: int

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> StoredTokens: ...
    @overload
    def __getitem__(self, number: slice) -> list[StoredTokens]: ...
    def __getitem__(self, number: int | slice) -> StoredTokens | list[StoredTokens]:
        if isinstance(number, slice):
            return [self[item] for item in range(len(self))[number]]
        return StoredTokens(self.store, self.rows[number], self.bands, self.width)


def longest_augmentation(clips: Sequence[Sequence[AudioTokens]]) -> AudioTokens:
    """Augmentation with the most tokens; of stored clips no other is read."""
    if isinstance(clips, TokenTable):
        clip, number = np.unravel_index(clips.store.sizes(clips.rows, "grid").argmax(), clips.rows.shape)
        return clips[int(clip)][int(number)]
    return max((tokens for clip in clips for tokens in clip), key=lambda tokens: len(tokens.grid))


class StoredClips(Mapping[Tracks, StoredTokens]):
    """Tokens by clip.

    Args:
        clips: sorted.
        table: their tokens.
    """

    def __init__(self, clips: list[Tracks], table: TokenTable) -> None:
        self._table = table
        self._places = {tracks: place for place, tracks in enumerate(clips)}

    def __getitem__(self, tracks: Tracks) -> StoredTokens:
        return self._table[self._places[tracks]]

    def select(self, clips: Iterable[Tracks]) -> TokenTable:
        """Tokens of some clips by their position, without the clips."""
        return replace(self._table, rows=self._table.rows[[self._places[tracks] for tracks in clips]])

    def __iter__(self) -> Iterator[Tracks]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def build_tokenizer(audio: AudioEncodingConfig, assets: Path, root: Path, device: str) -> AudioTokenizer:
    """Audio encoder that the configuration selects; its weights are not loaded yet."""
    tagger, pooling = YamNet(assets), TokenPooling(audio.pool_time, audio.pool_bands)
    if audio.encoder == "ast":
        encoder = AstEncoder(audio.ast.model, audio.ast.revision, device, audio.ast.dtype, root=root)
        return AstTokenizer(encoder, tagger, pooling)
    return YamnetTokenizer(tagger, tagger, pooling)


def cache_fingerprint(audio: AudioEncodingConfig, seed: int, tokenizer: AudioTokenizer) -> str:
    """Fingerprint of the cache of augmented clips."""
    rooms = {"rooms": ROOMS_VERSION} if audio.reverb_prob else {}
    identity = {"augment": AUGMENT_VERSION, "seed": seed, "sound": audio.augmentation_identity()}
    return fingerprint({"encoder": tokenizer.describe(), **identity, **rooms})


def load_or_encode_clips(
    audio: AudioEncodingConfig,
    seed: int,
    tokenizer: AudioTokenizer,
    store: FeatureStore,
    read_audio: Callable[[str], FloatArray],
    rows: list[dict[str, Any]],
) -> tuple[StoredClips, int, int]:
    """Tokens of every augmentation of every clip, the first of the clip itself.

    Args:
        audio: augmentation.
        seed: of the augmentation.
        tokenizer: audio encoder.
        store: of `TOKEN_COLUMNS` and `cache_fingerprint`.
        read_audio: samples [T] of a mono 48 kHz clip by id.
        rows: pairs; clips of split `train` may be mixed into others.

    Returns:
        tokens by clip, one item per augmentation; augmentations computed; augmentations found in the store.
    """
    clips = distinct_clips(rows)
    pool = distinct_clips(row for row in rows if row["split"] == "train")
    count = audio.num_augmentations

    def partner(item: int) -> Tracks:
        return mix_partner(clips[item // count], item % count, pool)

    keys = [fingerprint([clips[item // count], item % count, partner(item)]) for item in range(len(clips) * count)]
    missing = np.flatnonzero(store.find(keys) < 0).tolist()
    impulse_responses: list[FloatArray] = []
    if audio.reverb_prob and missing:
        impulse_responses = simulate_room_impulse_responses(NUM_ROOMS, tokenizer.rate, seed)

    @lru_cache(maxsize=WAVEFORM_CACHE_SIZE)
    def waveform(tracks: Tracks) -> FloatArray:
        mixed = mix_tracks([(read_audio(audio_id), gain_db) for audio_id, gain_db in tracks])
        return tokenizer.prepare(mixed, audio.max_seconds)

    def augmented(item: int) -> FloatArray:
        tracks = clips[item // count]
        if not item % count:
            return waveform(tracks)
        rng, other = seeded_rng(seed, "view", keys[item]), partner(item)
        return augment_audio(waveform(tracks), waveform(other) if other else None, audio, rng, impulse_responses)

    new: dict[str, dict[str, bytes]] = {}
    for start in range(0, len(missing), BATCH_SIZE):
        chunk = missing[start : start + BATCH_SIZE]
        encoded = tokenizer.encode([augmented(item) for item in chunk])
        new |= {keys[item]: tokens_to_row(tokens) for item, tokens in zip(chunk, encoded, strict=True)}
        if len(new) >= ROWS_PER_PART:
            store.append(new)
            new = {}
    store.append(new)
    places = store.find(keys).reshape(len(clips), count)
    table = TokenTable(store, places, tokenizer.bands, tokenizer.width)
    return StoredClips(clips, table), len(missing), len(keys) - len(missing)
