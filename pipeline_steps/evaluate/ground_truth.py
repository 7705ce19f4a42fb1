"""The ground-truth table (a manifest CSV): labels and true pairs. No stage before this one may read it."""

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
    """A picture and a sound that really belong together, by catalog id, with the class both show (None: not known)."""

    name: str
    image_id: str
    audio_id: str
    label: str | None


@dataclass(frozen=True, slots=True)
class GroundTruth:
    """What the table says about catalog items: label by item id (an item without one is left out), and the true pairs."""

    labels: Mapping[str, str]
    pairs: tuple[GoldPair, ...]
    unmatched: int


def parse_manifest(text: str, where: str) -> list[dict[str, str]]:
    """Rows of the manifest; a table with a header and no rows is a valid answer ("no ground truth").

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
    """Map manifest rows to catalog ids by path: a row's `file` is one of the catalog item's `sources`.

    Args:
        rows: from `parse_manifest`.
        images: catalog rows with `image_id`, `sources`.
        audio: catalog rows with `audio_id`, `sources`.

    Returns:
        Labels of all items that were found (several files with the same bytes: the first in manifest order), and the pairs
        whose split is "gold" and of which both sides are in the catalog. `unmatched` counts rows without an item.
    """
    by_path = {path: str(row["image_id"]) for row in images for path in row["sources"]}
    by_path |= {path: str(row["audio_id"]) for row in audio for path in row["sources"]}
    labels: dict[str, str] = {}
    sides: dict[str, dict[str, tuple[str, str]]] = {}
    unmatched = 0
    for row in rows:
        item = by_path.get(row["file"])
        if item is None:
            unmatched += 1
            continue
        if row["label"]:  # an empty cell is no class: two of them have nothing in common
            labels.setdefault(item, row["label"])
        if row["split"] == "gold" and row["pair"]:
            sides.setdefault(row["pair"], {})[row["kind"]] = (item, row["label"])
    pairs = tuple(
        GoldPair(name, found["image"][0], found["sound"][0], found["sound"][1] or None)
        for name, found in sorted(sides.items())
        if "image" in found and "sound" in found
    )
    return GroundTruth(labels, pairs, unmatched)
