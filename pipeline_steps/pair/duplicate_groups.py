"""Duplicate groups: near duplicates count as one item for the reuse cap and for the splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.near_duplicates import UnionFind, bucket_pairs
from pipeline_steps.core.seeding import seeded_rng

Links = list[tuple[int, int]]

BLOCK = 1024
EXACT_ROWS = 20_000
"""Rows up to which all pairs of embeddings are compared; of more rows, only pairs in one hash bucket."""

TABLES, PLANES = 24, 16

HASH_BLOCK = 32_768
"""Rows hashed at a time."""


def near_duplicates(rows: FloatArray, cosine: float) -> Links:
    """Pairs (i < j) of rows [N, D] whose cosine is at least `cosine`; zero rows match nothing.

    Up to `EXACT_ROWS` rows all pairs are compared. Of more rows, pairs are compared that share a bucket in one of `TABLES`
    tables of random hyperplanes (Charikar 2002; `PLANES` of them, and one more for each doubling from 65536 rows on) and whose
    sketches of 64 further hyperplanes are near. At cosine 0.995 the probability of missing a pair is below 1e-9 up to 100 000
    rows and below 1e-7 at two million rows; at cosine 0.97 it is 5e-4 and 1e-2 (angles after centering).
    """
    if len(rows) > EXACT_ROWS:
        return _by_hyperplanes(rows, cosine)
    return _within(l2_normalize(rows, np.float32), np.arange(len(rows)), cosine)


def _by_hyperplanes(rows: FloatArray, cosine: float) -> Links:
    """Near duplicates among many rows. The rows are read block by block, so they may be memory-mapped."""
    codes, sketch = _hash(rows)
    # Expected fraction of the sketch's planes in which a pair at this angle differs, times 1.5 for the angle after centering.
    fraction = 1.5 * float(np.arccos(cosine)) / np.pi
    bits = int(np.ceil(64 * fraction + 6 * np.sqrt(64 * fraction * (1 - fraction)))) + 1
    keys: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    for code in codes:
        pairs = bucket_pairs(code, sketch, bits)
        keys.append(pairs[:, 0] * len(rows) + pairs[:, 1])
    first, second = np.divmod(np.unique(np.concatenate(keys)), len(rows))
    found: Links = []
    for start in range(0, len(first), HASH_BLOCK):
        one, two = first[start : start + HASH_BLOCK], second[start : start + HASH_BLOCK]
        left, right = rows[one], rows[two]
        norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        close = (np.einsum("nd,nd->n", left, right) >= cosine * norms) & (norms > 0)
        found.extend(zip(one[close].tolist(), two[close].tolist(), strict=True))
    return found


def _hash(rows: FloatArray) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """Bucket of each row in each table [TABLES, N], and a sketch of 64 sign bits [N]."""
    per_table = min(PLANES + max(0, round(np.log2(len(rows) / 65_536))), 30)
    random = seeded_rng(0, "hyperplanes")
    planes = random.standard_normal((rows.shape[1], TABLES * per_table + 64)).astype(np.float32)
    mean = np.zeros(rows.shape[1])
    for start in range(0, len(rows), HASH_BLOCK):
        mean += l2_normalize(rows[start : start + HASH_BLOCK], np.float32).sum(axis=0, dtype=np.float64)
    # Vectors of one modality have a large common mean; without it the planes divide the data evenly.
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


def _within(unit: FloatArray, members: IntArray, cosine: float) -> Links:
    found: Links = []
    chosen = unit[members]
    for start in range(0, len(chosen), BLOCK):
        close = chosen[start : start + BLOCK] @ chosen[start:].T >= cosine
        first, second = np.nonzero(np.triu(close, k=1))
        found.extend(zip(members[first + start].tolist(), members[second + start].tolist(), strict=True))
    return found


def merge(labels: Sequence[str], links: Iterable[tuple[int, int]]) -> list[str]:
    """Merge linked groups: items with one label, or linked, are in one group, named by its smallest label.

    The name depends on the members alone, so a change of another group does not change it.
    """
    names = sorted(set(labels))  # the smallest index of a set is its smallest label
    place = {name: index for index, name in enumerate(names)}
    sets = UnionFind(len(names))
    for first, second in links:
        sets.union(place[labels[first]], place[labels[second]])
    return [names[sets.find(place[label])] for label in labels]
