"""Rows of the Parquet release: images and audio embedded in the columns that `datasets` and the hub's viewer read. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline_steps.core.media_shards import SAMPLE_RATE
from pipeline_steps.pair.release.selection import sample_json

Row = Mapping[str, Any]

MEDIA = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])
"""Storage type of the features Image and Audio of `datasets`."""

_TRACK = pa.struct(
    [
        pa.field("audio_id", pa.string()),
        pa.field("phrase", pa.string()),
        pa.field("gain_db", pa.float32()),
        pa.field("duration_s", pa.float64()),
        pa.field("license", pa.string()),
        pa.field("author", pa.string()),
        pa.field("source", pa.string()),
    ]
)
_METADATA = [
    pa.field("pair_id", pa.string()),
    pa.field("phrase", pa.string()),
    pa.field("score", pa.float32()),
    pa.field("z_score", pa.float32()),
    pa.field("license", pa.string()),
    pa.field("obligations", pa.list_(pa.string())),
    *(pa.field(f"image_{name}", pa.string()) for name in ("id", "group", "license", "author", "source")),
    pa.field("tracks", pa.list_(_TRACK)),
]
_FEATURE_NAMES = {"string": "string", "float": "float32", "double": "float64"}
"""Arrow type -> `dtype` of a Value of `datasets`."""


def audio_columns(pairs: Sequence[Row]) -> list[str]:
    """Names of the audio columns: `audio` for the first track, `audio_2`, `audio_3`... for others."""
    most = max((len(pair["tracks"]) for pair in pairs), default=1)
    return ["audio", *(f"audio_{number}" for number in range(2, most + 1))]


def release_schema(audio: Sequence[str]) -> pa.Schema:
    """Arrow schema with the key `huggingface`, from which `datasets` and the hub's viewer read the features."""
    fields = [pa.field("image", MEDIA), *(pa.field(name, MEDIA) for name in audio), *_METADATA]
    media = {"image": {"_type": "Image"}, **{name: {"sampling_rate": SAMPLE_RATE, "_type": "Audio"} for name in audio}}
    features = {field.name: media.get(field.name) or _feature(field.type) for field in fields}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """Feature of `datasets` for a type, in the form of its JSON."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {kind.field(index).name: _feature(kind.field(index).type) for index in range(kind.num_fields)}
    return {"dtype": _FEATURE_NAMES[str(kind)], "_type": "Value"}


def release_row(
    pair: Row, image: Row, audio: Mapping[str, Row], image_bytes: bytes, audio_bytes: Sequence[bytes]
) -> dict[str, Any]:
    """Row of a pair.

    Args:
        image, audio: catalog rows of the image, and of the clips by id.
        image_bytes: PNG.
        audio_bytes: FLAC of each track.
    """
    sample = sample_json(pair, image, audio)
    credit = sample.pop("image")
    names = audio_columns([pair])
    return {
        **sample,
        "image": {"bytes": image_bytes, "path": f"{pair['pair_id']}.png"},
        **{name: {"bytes": flac, "path": f"{pair['pair_id']}.flac"} for name, flac in zip(names, audio_bytes, strict=True)},
        "phrase": sample["tracks"][0]["phrase"],
        **{f"image_{name.removeprefix('image_')}": value for name, value in credit.items()},
    }
