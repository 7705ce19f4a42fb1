"""Who may be paired, and the tables as index arrays: the step from rows to numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline_steps.core.errors import DataError
from pipeline_steps.pair.candidates import EventArrays, NeighborArrays, event_weight
from pipeline_steps.pair.duplicate_groups import merge, near_duplicates
from pipeline_steps.pair.release.license_terms import terms

Row = Mapping[str, Any]
Vectors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class EligibleAudio:
    """Admitted pool sounds: ids (sorted), their duplicate groups, catalog rows; `excluded` counts the others by reason."""

    ids: list[str]
    groups: list[str]
    rows: dict[str, Row]
    excluded: dict[str, int]


@dataclass(frozen=True, slots=True)
class EligibleImages:
    """Admitted pictures: ids (sorted), their groups, catalog rows; `refused` gives a code and reason to each of the others."""

    ids: list[str]
    groups: list[str]
    rows: dict[str, Row]
    refused: dict[str, tuple[str, str]]


def license_allowed(license: str | None, rule: str) -> bool:
    """Does the `license_policy` of the configuration let this license into pairs?"""
    if rule == "any":
        return True
    found = terms(license)
    return found.publishable and not (rule == "no-copyleft" and found.obligations & {"share-alike", "source"})


def eligible_audio(catalog: Sequence[Row], vectors: Vectors, cosine: float, rule: str) -> EligibleAudio:
    """Join duplicate groups by embedding, then leave out what is held out, shares a group with it, or has no license for it."""
    rows = sorted(catalog, key=lambda row: str(row["audio_id"]))
    known = [index for index, row in enumerate(rows) if row["audio_id"] in vectors]
    links: list[tuple[int, int]] = []
    if known:
        matrix = np.stack([vectors[rows[index]["audio_id"]] for index in known])
        links = [(known[i], known[j]) for i, j in near_duplicates(matrix, cosine)]
    groups = merge([row["group_id"] for row in rows], links)
    kept_back = {group for group, row in zip(groups, rows, strict=True) if row["holdout"]}
    excluded: Counter[str] = Counter()
    admitted: list[int] = []
    for index, row in enumerate(rows):
        if row["holdout"]:
            continue
        if groups[index] in kept_back:
            excluded["HOLDOUT_GROUP"] += 1
        elif not license_allowed(row["license"], rule):
            excluded["LICENSE"] += 1
        else:
            admitted.append(index)
    if not admitted:
        raise DataError(
            f"no sound may be paired: {len(rows)} in the catalog, excluded {dict(excluded)}, the rest is held out",
            "check data/catalog/audio.parquet, pair.license_policy and pair.audio_duplicate_cosine",
        )
    return EligibleAudio(
        [rows[index]["audio_id"] for index in admitted],
        [groups[index] for index in admitted],
        {rows[index]["audio_id"]: rows[index] for index in admitted},
        dict(sorted(excluded.items())),
    )


def eligible_images(catalog: Sequence[Row], with_events: set[str], rule: str) -> EligibleImages:
    """Pictures that have events and are not held out; those near a holdout or without a license for it are refused."""
    kept_back = {row["group_id"] for row in catalog if row["holdout"]}
    rows: dict[str, Row] = {}
    refused: dict[str, tuple[str, str]] = {}
    for row in sorted(catalog, key=lambda row: str(row["image_id"])):
        name = row["image_id"]
        if row["holdout"] or name not in with_events:
            continue
        if row["group_id"] in kept_back:
            refused[name] = ("HOLDOUT_GROUP", "a near duplicate of this picture is kept for evaluation")
        elif not license_allowed(row["license"], rule):
            refused[name] = ("LICENSE", f"license {row['license']!r} is not admitted by pair.license_policy = {rule}")
        else:
            rows[name] = row
    return EligibleImages(list(rows), [row["group_id"] for row in rows.values()], rows, refused)


def neighbor_arrays(table: pa.Table, sounds: EligibleAudio) -> tuple[NeighborArrays, dict[str, int]]:
    """Rows of the neighbor table whose sound is admitted, as arrays, and the index of each text id."""
    sound = _positions(table["audio_id"], sounds.ids)
    names = sorted(pc.unique(table["text_id"]).to_pylist())
    texts = {name: index for index, name in enumerate(names)}
    text = _positions(table["text_id"], names)
    keep = np.flatnonzero(sound >= 0)
    keep = keep[np.lexsort((table["rank"].to_numpy()[keep], text[keep]))]
    starts = np.searchsorted(text[keep], np.arange(len(names) + 1)).astype(np.int64)
    numbers = {name: table[name].to_numpy().astype(np.float64)[keep] for name in ("score", "z_score", "corrected_score")}
    return NeighborArrays(starts, sound[keep], numbers["score"], numbers["z_score"], numbers["corrected_score"]), texts


def event_arrays(
    table: pa.Table, pictures: EligibleImages, texts: Mapping[str, int], min_confidence: float, emphasis: float
) -> tuple[EventArrays, list[str]]:
    """Rows of the event table that count, as arrays, and the phrase of each."""
    wanted = pc.and_(
        pc.is_in(table["image_id"], value_set=pa.array(pictures.ids, pa.string())),
        pc.and_(
            pc.is_in(table["text_id"], value_set=pa.array(list(texts), pa.string())),
            pc.greater_equal(table["confidence"], min_confidence),
        ),
    )
    rows = table.filter(wanted).sort_by([("image_id", "ascending"), ("rank", "ascending")])
    picture = _positions(rows["image_id"], pictures.ids)
    names = list(texts)
    text = np.array(list(texts.values()), dtype=np.int64)[_positions(rows["text_id"], names)]
    salience, confidence = (rows[name].to_numpy().astype(np.float64) for name in ("salience", "confidence"))
    weight = event_weight(salience, confidence, emphasis)
    return EventArrays(picture, text, weight), [str(phrase) for phrase in rows["phrase"].to_pylist()]


def _positions(column: pa.ChunkedArray, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Index of each value among `names`, -1 for those that are not there."""
    found = pc.fill_null(pc.index_in(column, value_set=pa.array(names, pa.string())), -1)
    return np.asarray(found.to_numpy(), dtype=np.int64)
