"""Near hashes and disjoint sets, compared with brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.core.near_duplicates import UnionFind, find_near_hashes


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12, unique=True), st.integers(0, 16), st.randoms())
def test_near_hashes_equal_brute_force(base: list[int], distance: int, random) -> None:
    values = set(base)
    for value in base:  # neighbours at every distance around the limit
        for bits in range(distance + 2):
            values.add(value ^ sum(1 << place for place in random.sample(range(64), bits)))
    hashes = np.array([*sorted(values), *base[:2]], np.uint64)  # two that are there already: equal hashes are near too
    expected = {
        (i, j) for i in range(len(hashes)) for j in range(i + 1, len(hashes))
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance
    }  # fmt: skip
    assert {tuple(pair) for pair in find_near_hashes(hashes, distance).tolist()} == expected


@pytest.mark.timeout(60)
def test_near_hashes_scale() -> None:
    """200 000 hashes with 2 000 planted near pairs: no quadratic work."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 2**64, 200_000, np.uint64)
    flips = np.uint64(1) << generator.integers(0, 64, (2000, 4)).astype(np.uint64)
    near = hashes[:2000] ^ np.bitwise_or.reduce(flips, axis=1)
    pairs = find_near_hashes(np.unique(np.concatenate([hashes, near])), 4)
    assert len(pairs) == 2000


@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))))
    )
)
def test_union_find_gives_the_smallest_member_of_each_component(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = case
    sets = UnionFind(count)
    for first, second in edges:
        sets.union(first, second)
    label = list(range(count))
    for _ in range(count):  # relaxation to the smallest reachable label
        for first, second in edges:
            label[first] = label[second] = min(label[first], label[second])
    assert [sets.find(item) for item in range(count)] == label
