"""Near-duplicate groups: whatever must stay on one side of a split. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from pipeline_steps.core.near_duplicates import UnionFind, find_near_hashes


def assign_duplicate_groups(
    ids: Sequence[str],
    keys: Iterable[tuple[int, Hashable]] = (),
    hashes: Sequence[str] | None = None,
    distance: int = -1,
) -> list[str]:
    """Group of each item: the smallest id among all it is tied to, directly or through others.

    Args:
        ids: distinct item ids.
        keys: (index of an item, a key it carries); items that share a key are tied.
        hashes: 64-bit perceptual hash of each item as 16 hex digits, or None.
        distance: hashes this close or closer tie; -1 ties none.

    Returns:
        One group id per item, in the order of `ids`.
    """
    order = sorted(range(len(ids)), key=lambda index: ids[index])
    place = {index: rank for rank, index in enumerate(order)}
    sets = UnionFind(len(ids))
    first: dict[Hashable, int] = {}
    for index, key in keys:
        sets.union(place[first.setdefault(key, index)], place[index])
    if hashes is not None and distance >= 0:
        by_hash: dict[str, int] = {}
        for index, text in enumerate(hashes):
            sets.union(place[by_hash.setdefault(text, index)], place[index])
        texts = list(by_hash)
        pairs = find_near_hashes(np.array([int(text, 16) for text in texts], np.uint64), distance)
        for left, right in pairs.tolist():
            sets.union(place[by_hash[texts[left]]], place[by_hash[texts[right]]])
    return [ids[order[sets.find(place[index])]] for index in range(len(ids))]
