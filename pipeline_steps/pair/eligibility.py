"""Images and audio that may be paired, and the neighbor and event tables as index arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.errors import DataError
from pipeline_steps.pair.candidates import EventArrays, NeighborArrays, event_weight
from pipeline_steps.pair.duplicate_groups import merge, near_duplicates
from pipeline_steps.pair.release.license_terms import terms

Row = Mapping[str, Any]
Vectors = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class EligibleItems:
    """Images or clips that may be paired: sorted ids, duplicate groups, catalog rows; code and reason of rejected items."""

    ids: list[str]
    groups: list[str]
    rows: dict[str, Row]
    rejected: dict[str, tuple[str, str]]


def license_allowed(license: str | None, policy: str) -> bool:
    """Whether `pair.license_policy` allows this license in pairs."""
    if policy == "any":
        return True
    found = terms(license)
    return found.publishable and not (policy == "no-copyleft" and found.obligations & {"share-alike", "source"})


def eligible_audio(catalog: Sequence[Row], vectors: Vectors, cosine: float, policy: str) -> EligibleItems:
    """Clips that are not held out, belong to no group of a held-out clip, and have an allowed license.

    Groups of the catalog are merged where embeddings are near duplicates.

    Raises:
        DataError: there are none.
    """
    rows = sorted(catalog, key=lambda row: str(row["audio_id"]))
    embedded = [index for index, row in enumerate(rows) if row["audio_id"] in vectors]
    links: list[tuple[int, int]] = []
    if embedded:
        matrix = np.stack([vectors[rows[index]["audio_id"]] for index in embedded])
        links = [(embedded[i], embedded[j]) for i, j in near_duplicates(matrix, cosine)]
    found = _eligible(rows, merge([row["group_id"] for row in rows], links), "audio_id", policy)
    if not found.ids:
        rejected = dict(Counter(code for code, _ in found.rejected.values()))
        raise DataError(
            f"no clip may be paired: {len(rows)} in the catalog, rejected {rejected}, the others are held out",
            "check data/catalog/audio.parquet, pair.license_policy and pair.audio_duplicate_cosine",
        )
    return found


def eligible_images(catalog: Sequence[Row], with_events: Set[str], policy: str) -> EligibleItems:
    """Images that have events, are not held out, are near no held-out image, and have an allowed license."""
    rows = sorted(catalog, key=lambda row: str(row["image_id"]))
    return _eligible(rows, [row["group_id"] for row in rows], "image_id", policy, with_events)


def _eligible(
    rows: Sequence[Row], groups: Sequence[str], key: str, policy: str, wanted: Set[str] | None = None
) -> EligibleItems:
    """Eligible items among catalog rows [N] with groups [N]; only ids in `wanted` are considered."""
    held_out = {group for group, row in zip(groups, rows, strict=True) if row["holdout"]}
    found = EligibleItems([], [], {}, {})
    for group, row in zip(groups, rows, strict=True):
        name = row[key]
        if row["holdout"] or (wanted is not None and name not in wanted):
            continue
        if group in held_out:
            found.rejected[name] = ("HOLDOUT_GROUP", "a near duplicate of this image is held out for evaluation")
        elif not license_allowed(row["license"], policy):
            found.rejected[name] = ("LICENSE", f"license {row['license']!r} is not admitted by pair.license_policy = {policy}")
        else:
            found.ids.append(name)
            found.groups.append(group)
            found.rows[name] = row
    return found


def neighbor_arrays(table: pa.Table, audio: EligibleItems) -> tuple[NeighborArrays, dict[str, int]]:
    """Rows of the neighbor table whose clip is eligible, as arrays, and the index of each text id."""
    clip = _positions(table["audio_id"], audio.ids)
    names = sorted(pc.unique(table["text_id"]).to_pylist())
    texts = {name: index for index, name in enumerate(names)}
    text = _positions(table["text_id"], names)
    keep = np.flatnonzero(clip >= 0)
    keep = keep[np.lexsort((table["rank"].to_numpy()[keep], text[keep]))]
    starts = np.searchsorted(text[keep], np.arange(len(names) + 1)).astype(np.int64)
    numbers = [table[name].to_numpy().astype(np.float64)[keep] for name in ("score", "z_score", "corrected_score")]
    return NeighborArrays(starts, clip[keep], *numbers), texts


def event_arrays(
    table: pa.Table, images: EligibleItems, texts: Mapping[str, int], min_confidence: float, exponent: float
) -> tuple[EventArrays, list[Row]]:
    """Rows of the event table that are used, as arrays, and phrase, distance and space of each row."""
    wanted = pc.and_(
        pc.is_in(table["image_id"], value_set=pa.array(images.ids, pa.string())),
        pc.and_(
            pc.is_in(table["text_id"], value_set=pa.array(list(texts), pa.string())),
            pc.greater_equal(table["confidence"], min_confidence),
        ),
    )
    rows = table.filter(wanted).sort_by([("image_id", "ascending"), ("rank", "ascending")])
    image = _positions(rows["image_id"], images.ids)
    names = list(texts)
    text = np.array(list(texts.values()), dtype=np.int64)[_positions(rows["text_id"], names)]
    salience, confidence = (rows[name].to_numpy().astype(np.float64) for name in ("salience", "confidence"))
    weight = event_weight(salience, confidence, exponent)
    return EventArrays(image, text, weight), rows.select(["phrase", "distance", "space"]).to_pylist()


def _positions(column: pa.ChunkedArray, names: Sequence[str]) -> IntArray:
    """Index of each value among `names`; -1 for a value that is not among them."""
    found = pc.fill_null(pc.index_in(column, value_set=pa.array(names, pa.string())), -1)
    return np.asarray(found.to_numpy(), dtype=np.int64)
