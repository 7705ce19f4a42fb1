"""Arrow schemas of the tables between stages. `docs/reference/data-schemas.md` explains each column and unit."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

PUBLIC_DOMAIN = "LicenseRef-Public-Domain"
"""In a column `license`: public domain, for which SPDX has no id."""

DISTANCES = ("near", "medium", "far")
"""Values of the columns `distance`: of a sound from the viewer."""

SPACES = ("open_air", "street", "small_room", "hall", "church", "cave", "under_water")
"""Values of the columns `space`: the acoustic space of an image."""


def _field(name: str, kind: pa.DataType, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable)


@dataclass(frozen=True, slots=True)
class TableSchema:
    """Schema of a table and the key columns that sort it, which makes its bytes a function of its rows.

    Columns in `optional` are absent from a file in which they have no value, and null when such a file is read.
    """

    name: str
    schema: pa.Schema
    key: tuple[str, ...]
    unique: bool = True
    optional: tuple[str, ...] = ()


def _table(
    name: str, fields: list[pa.Field], key: tuple[str, ...], unique: bool = True, optional: tuple[str, ...] = ()
) -> TableSchema:
    return TableSchema(name, pa.schema(fields), key, unique, optional)


_PROVENANCE = [
    _field("path", pa.string()),  # first path in sorted order, relative to the pool root, escaped
    _field("sources", pa.list_(pa.string())),  # every path that holds these bytes
    _field("bytes", pa.int64()),
    _field("format", pa.string()),
    _field("normalizations", pa.list_(pa.string())),  # codes of repairs by normalization
    _field("license", pa.string(), True),  # SPDX id, null when unknown
    _field("author", pa.string(), True),
    _field("source", pa.string(), True),  # where it comes from: package, URL, recording
    _field("text", pa.string(), True),  # words that came with the file: caption, title, tags; untrusted
    _field("group_id", pa.string()),  # near-duplicate / same-recording group: a split never cuts one
    _field("holdout", pa.bool_()),  # true: only used in evaluation
]

IMAGES = _table(
    "images",
    [
        _field("image_id", pa.string()),
        _field("sha256", pa.string()),
        *_PROVENANCE,
        _field("width", pa.int32()),  # px, of the original after orientation
        _field("height", pa.int32()),
        _field("num_frames", pa.int32()),
        _field("phash", pa.string()),  # 64-bit perceptual hash, 16 hex digits
    ],
    ("image_id",),
    optional=("text",),
)

AUDIO = _table(
    "audio",
    [
        _field("audio_id", pa.string()),
        _field("sha256", pa.string()),
        *_PROVENANCE,
        _field("sample_rate", pa.int32()),  # Hz, of the original
        _field("channels", pa.int16()),
        _field("duration_s", pa.float64()),
        _field("lufs", pa.float32()),  # BS.1770 integrated loudness of the mono mix
        _field("peak_dbfs", pa.float32()),
        _field("silence_ratio", pa.float32()),  # fraction of 20 ms frames below -60 dBFS
        _field("clipping_ratio", pa.float32()),  # fraction of samples at full scale
    ],
    ("audio_id",),
    optional=("text",),
)

QUARANTINE = _table(
    "quarantine",
    [
        _field("item_id", pa.string()),
        _field("kind", pa.string()),  # image | audio | unknown
        _field("path", pa.string()),  # escaped, relative to the pool root
        _field("bytes", pa.int64()),
        _field("stage", pa.string()),
        _field("code", pa.string()),
        _field("reason", pa.string()),
        _field("decoder", pa.string()),
        _field("action", pa.string()),  # dropped | abstained
        _field("retryable", pa.bool_()),
    ],
    ("kind", "path", "item_id"),
    unique=False,
)

EVENTS = _table(
    "events",
    [
        _field("image_id", pa.string()),
        _field("rank", pa.int16()),  # 0 is the most prominent event
        _field("text_id", pa.string()),
        _field("phrase", pa.string()),  # short acoustic phrase
        _field("sound_source", pa.string()),  # what makes it
        _field("visible", pa.bool_()),
        _field("salience", pa.float32()),  # 0..1, prominence within the scene
        _field("confidence", pa.float32()),  # 0..1, that the source is present and audible
        _field("distance", pa.string(), True),  # one of DISTANCES; null: unknown
        _field("space", pa.string(), True),  # one of SPACES, of the image; null: unknown
    ],
    ("image_id", "rank"),
    optional=("distance", "space"),
)

ABSTAINED = _table(
    "abstained",
    [
        _field("image_id", pa.string()),
        _field("stage", pa.string()),  # caption | pair
        _field("code", pa.string()),
        _field("reason", pa.string()),
        _field("score", pa.float32(), True),
    ],
    ("image_id",),
)

TEXT_IDS = _table(
    "text_ids", [_field("row", pa.int32()), _field("text_id", pa.string()), _field("phrase", pa.string())], ("row",)
)

AUDIO_IDS = _table("audio_ids", [_field("row", pa.int32()), _field("audio_id", pa.string())], ("row",))

NEIGHBORS = _table(
    "neighbors",
    [
        _field("text_id", pa.string()),
        _field("rank", pa.int16()),
        _field("audio_id", pa.string()),
        _field("score", pa.float32()),  # inner product in the text-audio space
        _field("z_score", pa.float32()),  # (score - mean) / std over random pool sounds for this text
        _field("corrected_score", pa.float32()),  # score after hub damping; what pairing uses
    ],
    ("text_id", "rank"),
)

TRACK = pa.struct(
    [
        pa.field("audio_id", pa.string(), nullable=False),
        pa.field("phrase", pa.string(), nullable=False),
        pa.field("gain_db", pa.float32(), nullable=False),
    ]
)

PAIRS = _table(
    "pairs",
    [
        _field("pair_id", pa.string()),
        _field("image_id", pa.string()),
        _field("tracks", pa.list_(TRACK)),
        _field("score", pa.float32()),  # damped score of the first track
        _field("z_score", pa.float32()),
        _field("license", pa.string(), True),  # the stricter of both
        _field("image_license", pa.string(), True),
        _field("audio_license", pa.string(), True),
        _field("image_group", pa.string()),
        _field("audio_group", pa.string()),
        _field("split", pa.string()),  # train | val | test
        _field("distance", pa.string(), True),  # of the event of the first track
        _field("space", pa.string(), True),  # of the image
    ],
    ("pair_id",),
    optional=("distance", "space"),
)

_MEMBER = [
    _field("shard", pa.string()),  # file name of the tar
    _field("member", pa.string()),
    _field("offset", pa.int64()),  # of the first payload byte in the tar
    _field("size", pa.int64()),  # bytes
    _field("sha256", pa.string()),  # of the payload
]

SHARD_INDEX = _table(
    "shard_index",
    [
        _field("item_id", pa.string()),
        _field("kind", pa.string()),  # image | audio
        *_MEMBER,
    ],
    ("kind", "item_id"),
)

RELEASE_INDEX = _table(
    "release_index",
    [
        _field("pair_id", pa.string()),
        _field("split", pa.string()),
        *_MEMBER,
    ],
    ("shard", "offset"),
)
