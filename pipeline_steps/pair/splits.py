"""Splits of image groups and audio groups, by the hash of the group.

Images are paired with audio of the same split only, so no image group and no audio group is in two splits. A hash decides, so a
new item changes the split of no other item, except through the two corrections below, which depend on an item's own neighbors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set

SPLITS = ("train", "val", "test")

Kinds = Mapping[str, Set[str]]
"""Kinds of sound event of each group: texts or events that match it best."""


def hash_to_unit_interval(group: str, kind: str, seed: int) -> float:
    """Number in [0, 1) of a group: the first 53 bits of the sha256 of seed, kind and name."""
    digest = hashlib.sha256(f"{seed}:{kind}:{group}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def split_from_hash(group: str, kind: str, seed: int, test: float, val: float) -> str:
    """Split of a group by its hash, for fractions `test` and `val`."""
    number = hash_to_unit_interval(group, kind, seed)
    if number < test:
        return "test"
    return "val" if number < test + val else "train"


def audio_splits(groups: Sequence[str], kinds: Kinds, seed: int, test: float, val: float) -> dict[str, str]:
    """Split of every audio group by its hash; a group that shares no kind with a training group moves to training.

    So the test split has clips that training does not use, but no kind of sound event that training does not use.
    """
    splits = {group: split_from_hash(group, "audio", seed, test, val) for group in groups}
    trained = _train_kinds(splits, kinds)
    return {group: split if kinds.get(group, set()) & trained else "train" for group, split in splits.items()}


def image_splits(
    best: Mapping[str, Mapping[str, float]], kinds: Kinds, seed: int, test: float, val: float, min_relative_value: float
) -> dict[str, str]:
    """Split of every image group: by its hash if it has a good match there, else train, else the split of its best match.

    A group outside training whose kind no training group has then moves to training, if it has a good match there.

    Args:
        best: value of the best clip in each split, for each image group.
        min_relative_value: a match is good if its value is at least this fraction of the group's best value in any split.
    """
    result: dict[str, str] = {}
    trainable: set[str] = set()
    for group, values in best.items():
        top = max(values.values(), default=0.0)
        good = {split for split, value in values.items() if value >= min_relative_value * top}
        hashed = split_from_hash(group, "image", seed, test, val)
        if "train" in good:
            trainable.add(group)
        if hashed in good or not good:
            result[group] = hashed
        else:
            result[group] = "train" if "train" in good else max(sorted(good), key=lambda split: values[split])
    trained = _train_kinds(result, kinds)
    return {
        group: "train" if group in trainable and not kinds.get(group, set()) & trained else split
        for group, split in result.items()
    }


def _train_kinds(splits: Mapping[str, str], kinds: Kinds) -> set[str]:
    return set().union(*(kinds.get(group, set()) for group, split in splits.items() if split == "train"))
