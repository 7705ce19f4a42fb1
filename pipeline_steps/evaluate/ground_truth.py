"""Ground-truth table (CSV): labels and true pairs. Stage `evaluate` alone reads it."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_steps.core.errors import DataError

COLUMNS = ("kind", "file", "label", "split", "pair")


@dataclass(frozen=True, slots=True)
class GoldPair:
    """A true image-audio pair by catalog ids, with the class of both (None if unknown)."""

    name: str
    image_id: str
    audio_id: str
    label: str | None


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """Contents of the table in terms of the catalog.

    Attributes:
        labels: class by catalog id; items without a class are left out.
        pairs: pairs with split `gold` whose image and audio are in the catalog.
        num_unmatched: rows whose file is not in the catalog.
    """

    labels: Mapping[str, str]
    pairs: tuple[GoldPair, ...]
    num_unmatched: int


def parse_manifest(text: str, where: str) -> list[dict[str, str]]:
    """Rows of the table; a table without rows is valid and means that there is no ground truth.

    Args:
        text: the CSV.
        where: path for messages.

    Raises:
        DataError: a column is missing.
    """
    reader = csv.DictReader(io.StringIO(text))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
    if missing:
        raise DataError(f"{where}: column {missing[0]!r} is missing", f"a ground-truth table has {', '.join(COLUMNS)}")
    return [{name: row.get(name) or "" for name in COLUMNS} for row in reader]


def match(
    rows: Sequence[Mapping[str, str]], images: Sequence[Mapping[str, Any]], audio: Sequence[Mapping[str, Any]]
) -> GroundTruth:
    """Match rows of the table to catalog items by path: `file` is one of the item's `sources`.

    An item with several files has the label of the first one in the table.

    Args:
        rows: from `parse_manifest`.
        images: catalog rows with `image_id`, `sources`.
        audio: catalog rows with `audio_id`, `sources`.
    """
    id_of = {path: str(row["image_id"]) for row in images for path in row["sources"]}
    id_of |= {path: str(row["audio_id"]) for row in audio for path in row["sources"]}
    labels: dict[str, str] = {}
    sides: dict[str, dict[str, tuple[str, str]]] = {}
    num_unmatched = 0
    for row in rows:
        item = id_of.get(row["file"])
        if item is None:
            num_unmatched += 1
            continue
        if row["label"]:  # an empty cell means an unknown class, not a class that such items share
            labels.setdefault(item, row["label"])
        if row["split"] == "gold" and row["pair"]:
            sides.setdefault(row["pair"], {})[row["kind"]] = (item, row["label"])
    pairs = tuple(
        GoldPair(name, found["image"][0], found["sound"][0], found["sound"][1] or None)
        for name, found in sorted(sides.items())
        if "image" in found and "sound" in found
    )
    return GroundTruth(labels, pairs, num_unmatched)
