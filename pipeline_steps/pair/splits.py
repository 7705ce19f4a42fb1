"""Which side of the experiment a group is on. Chosen by the hash of the group, before anything is matched.

Pairs are only made inside a split, so neither a picture group nor a sound group can cross. A hash decides alone, so a new
item moves nobody: the exceptions are the two repairs below, which depend on an item's own neighbors and on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set

SPLITS = ("train", "val", "test")


def hash_to_unit_interval(group: str, kind: str, seed: int) -> float:
    """A number in [0, 1) that belongs to a group: the first 53 bits of the sha256 of seed, kind and name."""
    digest = hashlib.sha256(f"{seed}:{kind}:{group}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2.0**53


def split_from_hash(group: str, kind: str, seed: int, test_share: float, val_share: float) -> str:
    """The split a group's hash asks for."""
    number = hash_to_unit_interval(group, kind, seed)
    if number < test_share:
        return "test"
    return "val" if number < test_share + val_share else "train"


def sound_splits(
    groups: Sequence[str], kinds: Mapping[str, Set[str]], seed: int, test_share: float, val_share: float
) -> dict[str, str]:
    """Split of every sound group; one whose kind would not be heard in training goes to training.

    Args:
        groups: names of the groups.
        kinds: for each group, the kinds of sound it is an example of (texts it answers best). A held-out group must
            share a kind with a group that trains: the test asks for unheard recordings, not for unheard kinds.
    """
    asked = {group: split_from_hash(group, "audio", seed, test_share, val_share) for group in groups}
    heard: set[str] = set()
    for group, split in asked.items():
        if split == "train":
            heard |= kinds.get(group, set())
    return {group: split if split == "train" or kinds.get(group, set()) & heard else "train" for group, split in asked.items()}


def image_splits(
    best: Mapping[str, Mapping[str, float]],
    kinds: Mapping[str, Set[str]],
    seed: int,
    test_share: float,
    val_share: float,
    margin: float,
) -> dict[str, str]:
    """Split of every picture group: the one its hash asks for, if a good sound for it is there; else train; else the best.

    A held-out group whose kind no training picture has then goes to training, if a good sound for it is there.

    Args:
        best: for each picture group, the value of its best sound in each split where it has one.
        kinds: for each picture group, the events that its pictures are best matched by.
        margin: a split has a good sound if its best value is at least this share of the best anywhere.
    """
    result: dict[str, str] = {}
    trainable: set[str] = set()
    for group, values in best.items():
        top = max(values.values(), default=0.0)
        good = {split for split, value in values.items() if value >= margin * top}
        asked = split_from_hash(group, "image", seed, test_share, val_share)
        if "train" in good:
            trainable.add(group)
        if asked in good or not good:
            result[group] = asked
        elif "train" in good:
            result[group] = "train"
        else:
            result[group] = max(sorted(good), key=lambda split: values[split])
    drawn: set[str] = set()
    for group, split in result.items():
        if split == "train":
            drawn |= kinds.get(group, set())
    return {
        group: "train" if group in trainable and not kinds.get(group, set()) & drawn else split
        for group, split in result.items()
    }
