"""Near-duplicate groups: items that must stay in one split. Pure."""

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
    """Group id of each item: the smallest id of its connected component.

    Args:
        ids: distinct item ids.
        keys: (index of an item, key); items with the same key are connected.
        hashes: 64-bit perceptual hash of each item as 16 hex digits, or None.
        distance: items whose hashes differ in at most so many bits are connected; -1 disables this.

    Returns:
        One group id per item, in the order of `ids`.
    """
    order = sorted(range(len(ids)), key=lambda index: ids[index])
    rank = {index: place for place, index in enumerate(order)}
    sets = UnionFind(len(ids))
    first: dict[Hashable, int] = {}
    for index, key in keys:
        sets.union(rank[first.setdefault(key, index)], rank[index])
    if hashes is not None and distance >= 0:
        by_hash: dict[str, int] = {}
        for index, text in enumerate(hashes):
            sets.union(rank[by_hash.setdefault(text, index)], rank[index])
        texts = list(by_hash)
        pairs = find_near_hashes(np.array([int(text, 16) for text in texts], np.uint64), distance)
        for left, right in pairs.tolist():
            sets.union(rank[by_hash[texts[left]]], rank[by_hash[texts[right]]])
    return [ids[order[sets.find(rank[index])]] for index in range(len(ids))]
