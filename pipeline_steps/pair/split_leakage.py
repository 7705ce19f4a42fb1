"""Leak report: what is on more than one side of the experiment, with the held-out items as a side of their own. Recomputed
from the finished pairs and from raw evidence (content hash, perceptual hash, embedding), not only from the groups by which the
splits were made."""

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
"""Side of what evaluation alone may use, beside the splits."""


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Crossings by kind of evidence: (evidence name) -> pairs of ids on different sides."""

    crossings: Mapping[str, list[tuple[str, str]]]

    def counts(self) -> dict[str, int]:
        return {name: len(found) for name, found in self.crossings.items()}

    def refuse(self) -> None:
        """Raise DataError (exit 3) if anything crosses, naming the first two ids."""
        for name, found in self.crossings.items():
            if found:
                one, two = found[0]
                raise DataError(
                    f"leak between splits by {name}: {one} and {two} are on different sides ({len(found)} crossings)",
                    "give them one group in the metadata table, or raise the near-duplicate distance of ingest, and run again",
                    details={"crossings": self.counts()},
                )


def crossing_keys(keys: Iterable[tuple[Hashable, str, str]]) -> list[tuple[str, str]]:
    """From (key, id, split): for every key on more than one side, its first id on each of the first two sides."""
    sides: dict[Hashable, dict[str, str]] = defaultdict(dict)
    for key, item, split in sorted(keys, key=lambda row: (str(row[0]), row[1])):
        sides[key].setdefault(split, item)
    found = []
    for held in sides.values():
        if len(held) > 1:
            one, two = sorted(held.values())[:2]
            found.append((one, two))
    return sorted(found)


def find_leaks(
    pairs: Sequence[Mapping[str, Any]],
    phash: Mapping[str, str],
    embedding: Mapping[str, npt.NDArray[np.float32]],
    held_out: Iterable[str],
    bits: int,
    cosine: float,
) -> LeakReport:
    """Crossings among finished pairs (rows of the pairs table).

    Args:
        phash: perceptual hash of each picture, embedding: vector of each sound, both with the held-out ones.
        held_out: ids and groups that evaluation alone may use: none of them may be in a pair, nor anything near them.
        bits: pictures whose hashes are at most this far apart are one; cosine: sounds at least this close are one.
    """
    images = sorted({(pair["image_id"], pair["split"]) for pair in pairs})
    sounds = sorted({(track["audio_id"], pair["split"]) for pair in pairs for track in pair["tracks"]})
    kept = set(held_out)
    apart = sorted(kept - {name for name, _ in (*images, *sounds)})  # one that is in a pair is found by its id, below
    seen = [*images, *((name, HOLDOUT) for name in apart if name in phash)]
    near_images = find_near_hashes(np.array([int(phash[image], 16) for image, _ in seen], np.uint64), bits).tolist()
    known = [(sound, side) for sound, side in sounds if sound in embedding]
    known += [(name, HOLDOUT) for name in apart if name in embedding]
    rows = np.stack([embedding[sound] for sound, _ in known]) if known else np.zeros((0, 1), dtype=np.float32)
    named = [*images, *sounds, *((pair["image_group"], "") for pair in pairs), *((pair["audio_group"], "") for pair in pairs)]
    return LeakReport(
        {
            "picture": crossing_keys((image, image, split) for image, split in images),
            "picture group": crossing_keys((pair["image_group"], pair["image_id"], pair["split"]) for pair in pairs),
            "near-duplicate picture": _across(seen, near_images),
            "sound": crossing_keys((sound, sound, split) for sound, split in sounds),
            "sound group": crossing_keys((pair["audio_group"], pair["tracks"][0]["audio_id"], pair["split"]) for pair in pairs),
            "near-duplicate sound": _across(known, near_duplicates(rows, cosine)),
            "holdout": sorted({(name, name) for name, _ in named if name in kept}),
        }
    )


def _across(items: Sequence[tuple[str, str]], links: Iterable[tuple[int, int]]) -> list[tuple[str, str]]:
    return sorted((items[i][0], items[j][0]) for i, j in links if items[i][1] != items[j][1])


def train_phrase_overlap(pairs: Sequence[Mapping[str, Any]], split: str) -> float:
    """Share of the split's pairs whose sound phrase also occurs in training: wanted, it says that the kind was heard."""
    heard = {track["phrase"] for pair in pairs if pair["split"] == "train" for track in pair["tracks"]}
    own = [pair for pair in pairs if pair["split"] == split]
    return sum(pair["tracks"][0]["phrase"] in heard for pair in own) / len(own) if own else 0.0
