"""Both solvers, compared with brute force and with each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_steps.pair import assignment
from pipeline_steps.pair.assignment import Assignment, Edges, solve_assignment, solve_auction, solve_exact


def edges_of(table: dict[tuple[int, int], float], images: int, groups: int) -> Edges:
    keys = sorted(table)
    return Edges(
        np.array([p for p, _ in keys], dtype=np.int64),
        np.array([g for _, g in keys], dtype=np.int64),
        np.array([table[key] for key in keys], dtype=np.float64),
        images,
        groups,
    )


def check(edges: Edges, found: Assignment, capacity: int) -> None:
    chosen = np.flatnonzero(found.edge >= 0)
    assert (edges.image[found.edge[chosen]] == chosen).all()
    assert np.bincount(edges.group[found.edge[chosen]], minlength=1).max() <= capacity
    assert found.total == pytest.approx(edges.value[found.edge[chosen]].sum())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Edges, int, float]:
    images, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    cells = st.dictionaries(
        st.tuples(st.integers(0, images - 1), st.integers(0, groups - 1)), st.integers(1, 40).map(lambda v: v / 8), min_size=1
    )
    table, capacity = draw(cells), draw(st.integers(1, 3))
    best = 0.0
    for choice in itertools.product([-1, *range(groups)], repeat=images):
        if all(choice.count(g) <= capacity for g in range(groups)):
            total = sum(table.get((p, g), -1e9) for p, g in enumerate(choice) if g >= 0)
            best = max(best, total)
    return edges_of(table, images, groups), capacity, best


@settings(max_examples=150, deadline=None)
@given(problems())
def test_exact_is_optimal(problem: tuple[Edges, int, float]) -> None:
    edges, capacity, best = problem
    found = solve_exact(edges, capacity)
    check(edges, found, capacity)
    assert found.total == pytest.approx(best)


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([0.01, 0.1, 0.5]))
def test_auction_is_within_its_bound(problem: tuple[Edges, int, float], epsilon: float) -> None:
    edges, capacity, best = problem
    found = solve_auction(edges, capacity, epsilon)
    check(edges, found, capacity)
    assert found.total >= best - edges.n_images * epsilon - 1e-9
    assert found.gap == pytest.approx(edges.n_images * epsilon)


def large(images: int, groups: int, candidates: int) -> Edges:
    random = np.random.default_rng(1)
    popular = random.random(groups) ** 3
    group = np.stack([random.choice(groups, candidates, replace=False, p=popular / popular.sum()) for _ in range(images)])
    value = random.random((images, candidates)) + popular[group]
    return Edges(np.repeat(np.arange(images), candidates), group.reshape(-1), value.reshape(-1), images, groups)


def test_auction_agrees_with_exact_on_a_contested_pool() -> None:
    edges = large(400, 120, 20)
    exact, auction = solve_exact(edges, 3), solve_auction(edges, 3, 0.002)
    check(edges, auction, 3)
    assert exact.total >= auction.total >= exact.total - auction.gap
    assert (exact.edge < 0).any(), "the pool is contested"


def test_the_size_decides_the_solver_and_reruns_agree() -> None:
    edges = large(60, 30, 8)
    exact = solve_assignment(edges, 2, 60 * 8 * 2, 0.01)
    auction = solve_assignment(edges, 2, 60 * 8 * 2 - 1, 0.01)
    assert (exact.solver, auction.solver) == ("exact", "auction")
    assert (solve_assignment(edges, 2, 0, 0.01).edge == auction.edge).all()
    assert auction.gap == pytest.approx(60 * 0.01 * edges.value.mean())


def test_no_candidates_at_all() -> None:
    empty = np.zeros(0, dtype=np.int64)
    found = solve_assignment(Edges(empty, empty, np.zeros(0), 3, 2), 4, 1000, 0.01)
    assert found.edge.tolist() == [-1, -1, -1]


def test_a_cap_beyond_the_pool() -> None:
    edges = edges_of({(0, 0): 1.0, (1, 0): 2.0}, 2, 1)
    assert solve_assignment(edges, 10**6, 10**6, 0.01).edge.tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_slot_table_does_not_change_the_result(problem: tuple[Edges, int, float]) -> None:
    edges, capacity, _ = problem
    if not len(edges.value):
        return
    found = solve_auction(edges, capacity, 0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "MAX_SLOT_TABLE", 0)
        assert solve_auction(edges, capacity, 0.05).edge.tolist() == found.edge.tolist()
