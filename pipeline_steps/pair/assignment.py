"""Balanced assignment of images to audio groups with limited capacity.

Maximizes the sum of value[image, group] over the chosen edges. Each image is used at most once, each group at most `capacity`
times. Values are positive and abstaining has value 0, so a solution always exists. Two solvers of the same problem:

- `solve_exact`: every group has `capacity` identical slots, every image has a slot of its own for abstaining, and the sparse
  linear assignment is solved with the LAPJVsp algorithm of scipy (Jonker & Volgenant 1987).
- `solve_auction`: the auction of Bertsekas (1988, Annals of OR 14, "The auction algorithm: a distributed relaxation method
  for the assignment problem") with similar objects (Bertsekas & Castanon 1989), all bidders at once. The total is at most
  images x epsilon below the optimum. For millions of edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from pipeline_steps.core.array_types import DoubleArray, IntArray

MAX_SLOT_TABLE = 50_000_000
"""Groups x capacity up to which the auction keeps a table of the holders of each slot, so that a round reads no others."""


@dataclass(frozen=True, slots=True)
class Edges:
    """Candidate edges: image `image[e]` may take `group[e]` at `value[e]` > 0; at most one edge per (image, group)."""

    image: IntArray
    group: IntArray
    value: DoubleArray
    n_images: int
    n_groups: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """Chosen edge of each image (-1: none), total value, and largest distance of the total from the optimum (`gap`)."""

    edge: IntArray
    total: float
    gap: float
    solver: str


def solve_assignment(edges: Edges, capacity: int, exact_solver_max_edges: int, epsilon: float) -> Assignment:
    """Solve exactly while edges x capacity <= `exact_solver_max_edges`, else by auction with `epsilon` x mean value.

    The choice depends on the size of the input alone, so the same input always uses the same solver.
    """
    if len(edges.value) == 0:
        return Assignment(np.full(edges.n_images, -1, dtype=np.int64), 0.0, 0.0, "exact")
    slots = min(capacity, edges.n_images)
    if len(edges.value) * slots <= exact_solver_max_edges:
        return solve_exact(edges, slots)
    return solve_auction(edges, slots, epsilon * float(edges.value.mean()))


def solve_exact(edges: Edges, capacity: int) -> Assignment:
    """Optimal assignment. Memory and time grow with edges x capacity."""
    slot_rows = np.repeat(edges.image, capacity)
    slot_columns = (edges.group[:, None] * capacity + np.arange(capacity)[None, :]).reshape(-1)
    own = np.arange(edges.n_images)
    offset = edges.n_groups * capacity
    # A sparse matrix drops explicit zeros: all values are shifted by one. Every image takes exactly one column, so the
    # shift changes each total by the same amount.
    data = np.concatenate([np.repeat(edges.value, capacity) + 1.0, np.ones(edges.n_images)])
    matrix = csr_matrix(
        (data, (np.concatenate([slot_rows, own]), np.concatenate([slot_columns, offset + own]))),
        shape=(edges.n_images, offset + edges.n_images),
    )
    rows, columns = min_weight_full_bipartite_matching(matrix, maximize=True)
    chosen = np.full(edges.n_images, -1, dtype=np.int64)
    group_of = np.full(edges.n_images, -1, dtype=np.int64)
    real = columns < offset
    group_of[rows[real]] = columns[real] // capacity
    hit = edges.group == group_of[edges.image]
    chosen[edges.image[hit]] = np.flatnonzero(hit)
    return Assignment(chosen, float(edges.value[hit].sum()), 0.0, "exact")


def solve_auction(edges: Edges, capacity: int, epsilon: float) -> Assignment:
    """Assignment within n_images x epsilon of the optimum: in each round every free image bids for its best group."""
    order = np.lexsort((edges.group, edges.image))
    group, value = edges.group[order], edges.value[order]
    starts = np.searchsorted(edges.image[order], np.arange(edges.n_images + 1))
    price = np.zeros(edges.n_groups)
    holding = np.full(edges.n_images, -1, dtype=np.int64)  # edge (in sorted order) that each image holds
    paid = np.zeros(edges.n_images)
    slots = np.full((edges.n_groups, capacity), -1, dtype=np.int64) if edges.n_groups * capacity <= MAX_SLOT_TABLE else None
    active = np.flatnonzero(np.diff(starts) > 0)
    while len(active):
        best, first, second = _two_best(active, starts, group, value, price)
        bidding = first > 0  # else abstaining, with value 0, is at least as good, and stays so because prices only rise
        active, best, first, second = active[bidding], best[bidding], first[bidding], second[bidding]
        if not len(active):
            break
        target = group[best]
        holding[active] = best
        paid[active] = price[target] + (first - np.maximum(second, 0.0)) + epsilon
        touched = np.unique(target)
        if slots is None:
            holders = np.flatnonzero(holding >= 0)
            holders = holders[np.isin(group[holding[holders]], touched)]
        else:
            before = slots[touched].reshape(-1)
            holders = np.concatenate([before[before >= 0], active])
        active = _evict(touched, holders, group, holding, paid, price, slots, capacity)
    chosen = np.where(holding >= 0, order[holding], -1)
    total = float(edges.value[chosen[chosen >= 0]].sum())
    return Assignment(chosen, total, epsilon * edges.n_images, "auction")


def _two_best(
    active: IntArray, starts: IntArray, group: IntArray, value: DoubleArray, price: DoubleArray
) -> tuple[IntArray, DoubleArray, DoubleArray]:
    """Most profitable edge of each active image, its profit, and the second best profit (-inf if there is none)."""
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
    slots: IntArray | None,
    capacity: int,
) -> IntArray:
    """Keep the `capacity` highest bids of each touched group; the price of a full group is its lowest kept bid.

    Changes `holding`, `price` and `slots`.

    Args:
        holders: images that hold a slot of a touched group or bid for one.
        slots: holders of the slots of each group [G, capacity], -1 for a free one; None if that table would be too large.

    Returns:
        Images that lost their slot.
    """
    own = group[holding[holders]]
    order = np.lexsort((holders, -paid[holders], own))
    holders, own = holders[order], own[order]
    begins = np.flatnonzero(np.r_[True, own[1:] != own[:-1]])
    rank = np.arange(len(own)) - np.repeat(begins, np.diff(np.r_[begins, len(own)]))
    last = rank == capacity - 1
    price[own[last]] = paid[holders[last]]
    if slots is not None:
        kept = rank < capacity
        slots[touched] = -1
        slots[own[kept], rank[kept]] = holders[kept]
    lost = holders[rank >= capacity]
    holding[lost] = -1
    return np.sort(lost)
