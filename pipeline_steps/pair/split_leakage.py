"""Leakage between splits, recomputed from finished pairs: by ids, groups, content hashes, perceptual hashes and embeddings.

Held-out items are a split of their own. The evidence is independent of the groups by which the splits were made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.errors import DataError
from pipeline_steps.core.near_duplicates import find_near_hashes
from pipeline_steps.pair.duplicate_groups import near_duplicates

HOLDOUT = "holdout"
"""Split of items that only evaluation may use."""


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Pairs of ids in different splits, by kind of evidence."""

    crossings: Mapping[str, list[tuple[str, str]]]

    def counts(self) -> dict[str, int]:
        return {name: len(found) for name, found in self.crossings.items()}

    def refuse(self) -> None:
        """Raise DataError if there is leakage; the message has the first two ids."""
        for name, found in self.crossings.items():
            if found:
                one, two = found[0]
                raise DataError(
                    f"leak between splits by {name}: {one} and {two} are in different splits ({len(found)} crossings)",
                    "give them one group in the metadata table, or raise ingest.image.phash_distance, and run again",
                    details={"crossings": self.counts()},
                )


def crossing_keys(keys: Iterable[tuple[Hashable, str, str]]) -> list[tuple[str, str]]:
    """For every key of (key, id, split) in more than one split: its first id in each of the first two splits."""
    first: dict[Hashable, dict[str, str]] = defaultdict(dict)
    for key, item, split in sorted(keys, key=lambda row: (str(row[0]), row[1])):
        first[key].setdefault(split, item)
    pairs = [sorted(by_split.values())[:2] for by_split in first.values() if len(by_split) > 1]
    return sorted((one, two) for one, two in pairs)


def find_leaks(
    pairs: Sequence[Mapping[str, Any]],
    phash: Mapping[str, str],
    embedding: Mapping[str, npt.NDArray[np.float32]],
    held_out: Iterable[str],
    bits: int,
    cosine: float,
) -> LeakReport:
    """Leakage among finished pairs (rows of the pairs table).

    Args:
        phash: perceptual hash of each image, held-out images included.
        embedding: vector of each clip, held-out clips included.
        held_out: ids and groups that only evaluation may use; neither they nor their near duplicates may be in a pair.
        bits: largest hash distance of near-duplicate images.
        cosine: smallest cosine of near-duplicate clips.
    """
    images = sorted({(pair["image_id"], pair["split"]) for pair in pairs})
    clips = sorted({(track["audio_id"], pair["split"]) for pair in pairs for track in pair["tracks"]})
    reserved = set(held_out)
    unpaired = sorted(reserved - {name for name, _ in (*images, *clips)})  # a paired one is found by its id below
    hashed = [*images, *((name, HOLDOUT) for name in unpaired if name in phash)]
    near_images = find_near_hashes(np.array([int(phash[image], 16) for image, _ in hashed], np.uint64), bits).tolist()
    embedded = [(clip, split) for clip, split in clips if clip in embedding]
    embedded += [(name, HOLDOUT) for name in unpaired if name in embedding]
    rows = np.stack([embedding[clip] for clip, _ in embedded]) if embedded else np.zeros((0, 1), dtype=np.float32)
    named = [*images, *clips, *((pair["image_group"], "") for pair in pairs), *((pair["audio_group"], "") for pair in pairs)]
    return LeakReport(
        {
            "picture": crossing_keys((image, image, split) for image, split in images),
            "picture group": crossing_keys((pair["image_group"], pair["image_id"], pair["split"]) for pair in pairs),
            "near-duplicate picture": _across(hashed, near_images),
            "sound": crossing_keys((clip, clip, split) for clip, split in clips),
            "sound group": crossing_keys((pair["audio_group"], pair["tracks"][0]["audio_id"], pair["split"]) for pair in pairs),
            "near-duplicate sound": _across(embedded, near_duplicates(rows, cosine)),
            "holdout": sorted({(name, name) for name, _ in named if name in reserved}),
        }
    )


def _across(items: Sequence[tuple[str, str]], links: Iterable[tuple[int, int]]) -> list[tuple[str, str]]:
    return sorted((items[i][0], items[j][0]) for i, j in links if items[i][1] != items[j][1])


def train_phrase_overlap(pairs: Sequence[Mapping[str, Any]], split: str) -> float:
    """Fraction of the split's pairs whose phrase also occurs in training."""
    trained = {track["phrase"] for pair in pairs if pair["split"] == "train" for track in pair["tracks"]}
    own = [pair for pair in pairs if pair["split"] == split]
    return sum(pair["tracks"][0]["phrase"] in trained for pair in own) / len(own) if own else 0.0
