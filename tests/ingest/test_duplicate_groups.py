from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.ingest.duplicate_groups import assign_duplicate_groups


@given(st.permutations(["a", "b", "c", "d", "e"]))
def test_groups_are_independent_of_order(ids: list[str]) -> None:
    keys = {"b": "recording", "d": "recording"}
    hashes = {"a": 0, "b": 2**64 - 1, "c": 0b1111, "d": 2**40, "e": 2**63 + 2**50 + 2**20}
    groups = assign_duplicate_groups(
        ids,
        [(ids.index(item), key) for item, key in keys.items()],
        [f"{hashes[item]:016x}" for item in ids],
        distance=4,
    )
    # a-c differ in 4 bits, a-d in 1, a-e in 3; b and d have the same recording: one group
    assert set(groups) == {"a"}
    assert dict(zip(ids, assign_duplicate_groups(ids), strict=True)) == {item: item for item in ids}


def test_groups_by_key_only() -> None:
    assert assign_duplicate_groups(["c", "a", "b"], [(0, "x"), (2, "x"), (1, "y")]) == ["b", "a", "b"]
