"""Balanced assignment: which sound each picture gets, when a sound may serve only so many pictures.

Maximise sum of value[picture, group] over the chosen edges, each picture at most once, each group at most `capacity` times.
Values are positive and abstaining is worth 0, so a solution always exists. Two solvers of the same problem:

- `solve_exact`: every group is `capacity` identical slots, every picture has a slot of its own for abstaining, and the sparse
  linear assignment is solved with the LAPJVsp algorithm of scipy (Jonker & Volgenant 1987).
- `solve_auction`: the auction of Bertsekas (1988, Annals of OR 14, "The auction algorithm: a distributed relaxation method
  for the assignment problem") with similar objects (Bertsekas & Castanon 1989), all bidders at once. The total is at most
  pictures x epsilon below the optimum. For inputs of millions of edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from pipeline_steps.core.array_types import DoubleArray, IntArray

PLACES = 50_000_000
"""Groups x capacity up to which the auction keeps a table of who holds each place, so that a round looks at nobody else."""


@dataclass(frozen=True, slots=True)
class Edges:
    """Candidate edges: `picture[e]` may take `group[e]` at `value[e]` > 0. At most one edge per (picture, group)."""

    picture: IntArray
    group: IntArray
    value: DoubleArray
    n_pictures: int
    n_groups: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """`edge[p]` is the index of the chosen edge of picture p, or -1; `gap` bounds how far the total is from the optimum."""

    edge: IntArray
    total: float
    gap: float
    solver: str


def solve_assignment(edges: Edges, capacity: int, exact_edges: int, epsilon: float) -> Assignment:
    """Solve exactly while edges x capacity <= `exact_edges`, else by auction with `epsilon` x mean value.

    The rule looks at the size of the input alone, so the same input always takes the same way.
    """
    if len(edges.value) == 0:
        return Assignment(np.full(edges.n_pictures, -1, dtype=np.int64), 0.0, 0.0, "exact")
    slots = min(capacity, edges.n_pictures)
    if len(edges.value) * slots <= exact_edges:
        return solve_exact(edges, slots)
    return solve_auction(edges, slots, epsilon * float(edges.value.mean()))


def solve_exact(edges: Edges, capacity: int) -> Assignment:
    """The optimum. Memory and time grow with edges x capacity."""
    count = len(edges.value)
    slot_rows = np.repeat(edges.picture, capacity)
    slot_columns = (edges.group[:, None] * capacity + np.arange(capacity)[None, :]).reshape(-1)
    own = np.arange(edges.n_pictures)
    offset = edges.n_groups * capacity
    # Explicit zeros would be dropped from a sparse matrix: shift all values by one. Every picture takes exactly one
    # column, so the shift changes each total by the same amount.
    data = np.concatenate([np.repeat(edges.value, capacity) + 1.0, np.ones(edges.n_pictures)])
    matrix = csr_matrix(
        (data, (np.concatenate([slot_rows, own]), np.concatenate([slot_columns, offset + own]))),
        shape=(edges.n_pictures, offset + edges.n_pictures),
    )
    rows, columns = min_weight_full_bipartite_matching(matrix, maximize=True)
    chosen = np.full(edges.n_pictures, -1, dtype=np.int64)
    group_of = np.full(edges.n_pictures, -1, dtype=np.int64)
    real = columns < offset
    group_of[rows[real]] = columns[real] // capacity
    index = np.arange(count)
    hit = edges.group == group_of[edges.picture]
    chosen[edges.picture[hit]] = index[hit]
    return Assignment(chosen, float(edges.value[hit].sum()), 0.0, "exact")


def solve_auction(edges: Edges, capacity: int, epsilon: float) -> Assignment:
    """Within n_pictures x epsilon of the optimum, deterministic: in each round every free picture bids for its best group."""
    order = np.lexsort((edges.group, edges.picture))
    group, value = edges.group[order], edges.value[order]
    starts = np.searchsorted(edges.picture[order], np.arange(edges.n_pictures + 1))
    price = np.zeros(edges.n_groups)
    holding = np.full(edges.n_pictures, -1, dtype=np.int64)  # edge (in sorted order) each picture holds
    paid = np.zeros(edges.n_pictures)
    places = np.full((edges.n_groups, capacity), -1, dtype=np.int64) if edges.n_groups * capacity <= PLACES else None
    active = np.flatnonzero(np.diff(starts) > 0)
    while len(active):
        best, first, second = _two_best(active, starts, group, value, price)
        bidding = first > 0  # else abstaining, worth 0, is at least as good: and prices only rise, so for good
        active, best, first, second = active[bidding], best[bidding], first[bidding], second[bidding]
        if not len(active):
            break
        target = group[best]
        holding[active] = best
        paid[active] = price[target] + (first - np.maximum(second, 0.0)) + epsilon
        touched = np.unique(target)
        if places is None:
            holders = np.flatnonzero(holding >= 0)
            holders = holders[np.isin(group[holding[holders]], touched)]
        else:
            before = places[touched].reshape(-1)
            holders = np.concatenate([before[before >= 0], active])
        active = _evict(touched, holders, group, holding, paid, price, places, capacity)
    chosen = np.where(holding >= 0, order[holding], -1)
    total = float(edges.value[chosen[chosen >= 0]].sum())
    return Assignment(chosen, total, epsilon * edges.n_pictures, "auction")


def _two_best(
    active: IntArray, starts: IntArray, group: IntArray, value: DoubleArray, price: DoubleArray
) -> tuple[IntArray, DoubleArray, DoubleArray]:
    """For each active picture: its most profitable edge, that profit, and the second best profit (-inf if none)."""
    lengths = starts[active + 1] - starts[active]
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.arange(bounds[-1]) - np.repeat(bounds[:-1] - starts[active], lengths)
    profit = value[flat] - price[group[flat]]
    first = np.maximum.reduceat(profit, bounds[:-1])
    owner = np.repeat(np.arange(len(active)), lengths)
    ties = np.flatnonzero(profit == first[owner])
    _, leading = np.unique(owner[ties], return_index=True)
    position = ties[leading]
    profit[position] = -np.inf
    second = np.maximum.reduceat(profit, bounds[:-1])
    return flat[position], first, second


def _evict(
    touched: IntArray,
    holders: IntArray,
    group: IntArray,
    holding: IntArray,
    paid: DoubleArray,
    price: DoubleArray,
    places: IntArray | None,
    capacity: int,
) -> IntArray:
    """Keep the `capacity` highest bids of each touched group, set its price to the lowest kept bid if it is full.

    Args:
        holders: the pictures that hold a place in a touched group or bid for one.
        places: who holds the places of each group [G, capacity], -1 for nobody; None where that table would be too large.

    Returns the pictures that lost their place. Changes `holding`, `price` and `places`.
    """
    own = group[holding[holders]]
    order = np.lexsort((holders, -paid[holders], own))
    holders, own = holders[order], own[order]
    begins = np.flatnonzero(np.r_[True, own[1:] != own[:-1]])
    rank = np.arange(len(own)) - np.repeat(begins, np.diff(np.r_[begins, len(own)]))
    last = rank == capacity - 1
    price[own[last]] = paid[holders[last]]
    if places is not None:
        kept = rank < capacity
        places[touched] = -1
        places[own[kept], rank[kept]] = holders[kept]
    lost = holders[rank >= capacity]
    holding[lost] = -1
    return np.sort(lost)
