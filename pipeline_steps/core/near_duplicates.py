"""Near duplicates by perceptual hash, and disjoint sets that group them. Splits never divide a group."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

BITS = 64


class UnionFind:
    """Disjoint sets of 0..n-1 whose representative is the smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, item: int) -> int:
        """Smallest member of the set of `item`."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def union(self, first: int, second: int) -> None:
        """Join two sets."""
        first, second = self.find(first), self.find(second)
        if first != second:
            self._parent[max(first, second)] = min(first, second)


def find_near_hashes(hashes: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.int64]:
    """All index pairs [P, 2] (i < j, sorted) of 64-bit hashes at Hamming distance <= `distance`; exact.

    By the pigeonhole principle two words that differ in at most d bits agree in at least one of d + 1 sub-words, so only
    words that share a sub-word are compared (Norouzi et al. 2012, multi-index hashing). Time is quadratic in the
    number of equal hashes, so pass distinct hashes.
    """
    if distance < 0 or len(hashes) < 2:
        return np.zeros((0, 2), np.int64)
    edges = np.linspace(0, BITS, distance + 2).round().astype(int)
    words = ((hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1) for low, high in pairwise(edges))
    return np.unique(np.concatenate([bucket_pairs(word, hashes, distance) for word in words]), axis=0)


def bucket_pairs(buckets: npt.NDArray[Any], hashes: npt.NDArray[np.uint64], distance: int) -> npt.NDArray[np.int64]:
    """Index pairs [P, 2] (i < j) of 64-bit hashes [N] in one bucket, at Hamming distance <= `distance`."""
    order = np.argsort(buckets, kind="stable")
    ordered, value = buckets[order], hashes[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    after = np.repeat(ends, np.diff(np.r_[-1, ends])) - np.arange(len(order))  # number of later items of the bucket
    found = [np.zeros((0, 2), np.int64)]
    active, shift = np.flatnonzero(after >= 1), 1
    while len(active):  # partners at distance 1, 2, 3... in the order of the buckets
        close = active[np.bitwise_count(value[active] ^ value[active + shift]) <= distance]
        found.append(np.sort(np.stack([order[close], order[close + shift]], axis=1), axis=1))
        shift += 1
        active = active[after[active] >= shift]
    return np.concatenate(found)
