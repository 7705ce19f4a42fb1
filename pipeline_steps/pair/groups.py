"""Duplicate groups: items that are one recording, or nearly, count as one for the re-use cap and for the splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.seeding import generator

Ints = npt.NDArray[np.int64]
Links = list[tuple[int, int]]

BLOCK = 1024
EXACT_ROWS = 20_000
"""Rows up to which all pairs of embeddings are compared; above, only those that share a hash bucket."""

TABLES, PLANES = 24, 16


def near_duplicates(rows: npt.NDArray[np.float32], cosine: float) -> Links:
    """Pairs (i < j) of rows [N, D] whose cosine is at least `cosine`; zero rows match nothing.

    Up to `EXACT_ROWS` rows all pairs are compared. Above that, rows that share a bucket in one of `TABLES` tables of
    `PLANES` random hyperplanes (Charikar 2002): at cosine 0.995 a pair is missed with probability below 1e-9, at 0.97
    with 5e-4 (angles after centring).
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    if len(unit) <= EXACT_ROWS:
        return _within(unit, np.arange(len(unit)), cosine)
    found: set[tuple[int, int]] = set()
    for members in _hyperplane_buckets(unit):
        found.update(_within(unit, members, cosine))
    return sorted(found)


def _hyperplane_buckets(unit: npt.NDArray[np.float32]) -> Iterator[Ints]:
    random = generator(0, "hyperplanes")
    # Vectors of one modality share a large mean; without it the planes cut where the data is.
    centred = unit - unit.mean(axis=0, keepdims=True)
    for _ in range(TABLES):
        planes = random.standard_normal((unit.shape[1], PLANES)).astype(np.float32)
        code = (centred @ planes > 0) @ (1 << np.arange(PLANES))
        yield from _runs(code)


def _runs(code: npt.NDArray[np.integer]) -> Iterator[Ints]:
    """Index lists of equal codes, those with two or more members."""
    order = np.argsort(code, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(code[order])) + 1):
        if len(members) > 1:
            yield np.sort(members)


def _within(unit: npt.NDArray[np.float32], members: Ints, cosine: float) -> Links:
    found: Links = []
    chosen = unit[members]
    for start in range(0, len(chosen), BLOCK):
        close = chosen[start : start + BLOCK] @ chosen[start:].T >= cosine
        first, second = np.nonzero(np.triu(close, k=1))
        found.extend(zip(members[first + start].tolist(), members[second + start].tolist(), strict=True))
    return found


def near_hashes(hashes: Sequence[str], bits: int) -> Links:
    """Pairs (i < j) of 64-bit perceptual hashes (16 hex digits) at most `bits` apart (Hamming).

    Exact, and far below quadratic: of `bits` + 1 bands of the hash at least one is the same in both (pigeonhole), so only
    hashes that share a band are compared.
    """
    codes = np.array([int(value, 16) for value in hashes], dtype=np.uint64)
    edges = np.linspace(0, 64, bits + 2).astype(int)
    found: set[tuple[int, int]] = set()
    for low, high in pairwise(edges.tolist()):
        band = (codes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for members in _runs(band.astype(np.int64)):
            for start in range(0, len(members), BLOCK):
                distance = np.bitwise_count(codes[members[start : start + BLOCK], None] ^ codes[None, members[start:]])
                first, second = np.nonzero(np.triu(distance <= bits, k=1))
                found.update(zip(members[first + start].tolist(), members[second + start].tolist(), strict=True))
    return sorted(found)


def merge(labels: Sequence[str], links: Iterable[tuple[int, int]]) -> list[str]:
    """Join groups that are linked: items with one label, or linked, end in one group named by its smallest label.

    The name depends on the members alone, so an item that joins elsewhere renames nothing here.
    """
    parent: dict[str, str] = {label: label for label in labels}

    def root(label: str) -> str:
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    for first, second in links:
        one, two = sorted((root(labels[first]), root(labels[second])))
        parent[two] = one
    return [root(label) for label in labels]
