"""Duplicate groups: items that are one recording, or nearly, count as one for the re-use cap and for the splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import IntArray
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.near_duplicates import UnionFind
from pipeline_steps.core.seeding import seeded_rng

Links = list[tuple[int, int]]

BLOCK = 1024
EXACT_ROWS = 20_000
"""Rows up to which all pairs of embeddings are compared; above, only those that share a hash bucket."""

TABLES, PLANES = 24, 16

HASH_BLOCK = 32_768
"""Rows hashed at a time."""


def near_duplicates(rows: npt.NDArray[np.float32], cosine: float) -> Links:
    """Pairs (i < j) of rows [N, D] whose cosine is at least `cosine`; zero rows match nothing.

    Up to `EXACT_ROWS` rows all pairs are compared. Above that, rows that share a bucket in one of `TABLES` tables of random
    hyperplanes (Charikar 2002), `PLANES` of them and one more for each doubling from 65536 rows on, and whose sketches of 64
    further planes are near: at cosine 0.995 a pair is missed with probability below 1e-9 up to 100 000 rows and below 1e-7 at
    two millions, at 0.97 with 5e-4 and 1e-2 (angles after centring).
    """
    if len(rows) > EXACT_ROWS:
        return _by_hyperplanes(rows, cosine)
    return _within(l2_normalize(rows, np.float32), np.arange(len(rows)), cosine)


def _by_hyperplanes(rows: npt.NDArray[np.float32], cosine: float) -> Links:
    """Links of many rows; the rows are read block by block, so they may be memory-mapped."""
    codes, sketch = _hash(rows)
    # A pair at the asked angle differs in this share of the sketch's planes; half as much again for the angle after centring.
    share = 1.5 * float(np.arccos(cosine)) / np.pi
    bits = int(np.ceil(64 * share + 6 * np.sqrt(64 * share * (1 - share)))) + 1
    keys: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    for code in codes:
        first, second = _bucket_pairs(code, sketch, bits)
        keys.append(np.minimum(first, second) * len(rows) + np.maximum(first, second))
    first, second = np.divmod(np.unique(np.concatenate(keys)), len(rows))
    found: Links = []
    for start in range(0, len(first), HASH_BLOCK):
        one, two = first[start : start + HASH_BLOCK], second[start : start + HASH_BLOCK]
        left, right = rows[one], rows[two]
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        close = (np.einsum("nd,nd->n", left, right) >= cosine * norms) & (norms > 0)
        found.extend(zip(one[close].tolist(), two[close].tolist(), strict=True))
    return found


def _hash(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Bucket of each row in each table [TABLES, N], and a sketch of 64 sign bits [N]."""
    per_table = min(PLANES + max(0, round(np.log2(len(rows) / 65_536))), 30)
    random = seeded_rng(0, "hyperplanes")
    planes = random.standard_normal((rows.shape[1], TABLES * per_table + 64)).astype(np.float32)
    mean = np.zeros(rows.shape[1])
    for start in range(0, len(rows), HASH_BLOCK):
        mean += l2_normalize(rows[start : start + HASH_BLOCK], np.float32).sum(axis=0, dtype=np.float64)
    # Vectors of one modality share a large mean; without it the planes cut where the data is.
    mean /= len(rows)
    codes = np.empty((TABLES, len(rows)), np.int32)
    sketch = np.empty(len(rows), np.uint64)
    weights = (1 << np.arange(per_table)).astype(np.int32)
    for start in range(0, len(rows), HASH_BLOCK):
        part = slice(start, start + HASH_BLOCK)
        signs = (l2_normalize(rows[part], np.float32) - mean.astype(np.float32)) @ planes > 0
        codes[:, part] = (signs[:, :-64].reshape(len(signs), TABLES, per_table) @ weights).T
        sketch[part] = np.packbits(signs[:, -64:], axis=1).view(np.uint64)[:, 0]
    return codes, sketch


def _bucket_pairs(code: npt.NDArray[np.int32], sketch: npt.NDArray[np.uint64], bits: int) -> tuple[IntArray, IntArray]:
    """Rows that share a bucket and whose sketches differ in at most `bits` bits, as two arrays."""
    order = np.argsort(code, kind="stable")
    ordered, near = code[order], sketch[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    after = np.repeat(ends, np.diff(np.r_[-1, ends])) - np.arange(len(order))  # how many of the bucket come later
    left: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    right: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    active, shift = np.flatnonzero(after >= 1), 1
    while len(active):
        close = active[np.bitwise_count(near[active] ^ near[active + shift]) <= bits]
        left.append(order[close])
        right.append(order[close + shift])
        shift += 1
        active = active[after[active] >= shift]
    return np.concatenate(left), np.concatenate(right)


def _within(unit: npt.NDArray[np.float32], members: IntArray, cosine: float) -> Links:
    found: Links = []
    chosen = unit[members]
    for start in range(0, len(chosen), BLOCK):
        close = chosen[start : start + BLOCK] @ chosen[start:].T >= cosine
        first, second = np.nonzero(np.triu(close, k=1))
        found.extend(zip(members[first + start].tolist(), members[second + start].tolist(), strict=True))
    return found


def merge(labels: Sequence[str], links: Iterable[tuple[int, int]]) -> list[str]:
    """Join groups that are linked: items with one label, or linked, end in one group named by its smallest label.

    The name depends on the members alone, so an item that joins elsewhere renames nothing here.
    """
    names = sorted(set(labels))  # so that the smallest member of a set is its smallest label
    place = {name: index for index, name in enumerate(names)}
    sets = UnionFind(len(names))
    for first, second in links:
        sets.union(place[labels[first]], place[labels[second]])
    return [names[sets.find(place[label])] for label in labels]
