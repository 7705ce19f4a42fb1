"""Duplicate groups, compared with brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.pair import duplicate_groups


def rows_with_copies(n: int, copies: int) -> np.ndarray:
    random = np.random.default_rng(0)
    rows = random.standard_normal((n, 24)).astype(np.float32)
    rows[:copies] = rows[copies : 2 * copies] * 3 + 0.01 * random.standard_normal((copies, 24)).astype(np.float32)
    return rows


def test_near_duplicates_equal_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_with_copies(300, 40)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = [(i, j) for i in range(300) for j in range(i + 1, 300) if unit[i] @ unit[j] >= 0.99]
    assert len(expected) >= 40
    monkeypatch.setattr(duplicate_groups, "BLOCK", 64)
    assert duplicate_groups.near_duplicates(rows, 0.99) == expected
    monkeypatch.setattr(duplicate_groups, "EXACT_ROWS", 10)
    assert duplicate_groups.near_duplicates(rows, 0.99) == expected


def test_a_zero_row_has_no_duplicate() -> None:
    assert duplicate_groups.near_duplicates(np.zeros((3, 4), dtype=np.float32), 0.9) == []


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12), st.data())
def test_merge_makes_the_finest_common_groups(labels: list[str], data: st.DataObject) -> None:
    position = st.integers(0, len(labels) - 1)
    links = data.draw(st.lists(st.tuples(position, position), max_size=8))
    merged = duplicate_groups.merge(labels, links)
    reach = {i: {i} for i in range(len(labels))}
    for _ in labels:
        for i, j in [*links, *((i, j) for i in reach for j in reach if labels[i] == labels[j])]:
            joint = reach[i] | reach[j]
            for member in joint:
                reach[member] = joint
    for i, name in enumerate(merged):
        assert name == min(labels[j] for j in reach[i])
        assert {j for j, other in enumerate(merged) if other == name} == reach[i]


def test_near_duplicates_of_a_large_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clustered rows with a large common mean: buckets of unequal size, few copies."""
    random = np.random.default_rng(1)
    topics = random.standard_normal((20, 32)) + 2
    rows = (topics[random.integers(0, 20, 4000)] + 0.5 * random.standard_normal((4000, 32))).astype(np.float32)
    copies = random.permutation(4000)[:200].reshape(2, 100)
    rows[copies[0]] = 0.5 * rows[copies[1]] + 0.005 * random.standard_normal((100, 32)).astype(np.float32)
    rows[17] = 0
    exact = duplicate_groups.near_duplicates(rows, 0.995)
    assert len(exact) >= 95
    monkeypatch.setattr(duplicate_groups, "EXACT_ROWS", 10)
    monkeypatch.setattr(duplicate_groups, "HASH_BLOCK", 700)
    assert duplicate_groups.near_duplicates(rows, 0.995) == exact
