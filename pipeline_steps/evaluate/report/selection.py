"""Which items the report shows: chosen by a rule that is written on the page, never by hand. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def select_pairs_to_show(pairs: Sequence[Mapping[str, Any]], at_most: int, seed: int) -> list[tuple[str, Mapping[str, Any]]]:
    """Up to `at_most` pairs as (why it is shown, row): the best third by z, the weakest third, and random ones between.

    Ties are broken by pair id, so the choice is a function of the table and the seed.
    """
    ranked = sorted(pairs, key=lambda row: (-float(row["z_score"]), str(row["pair_id"])))
    if len(ranked) <= at_most:
        return [("all pairs, best first", row) for row in ranked]
    third = at_most // 3
    best, weakest = ranked[:third], ranked[len(ranked) - third :]
    between = ranked[third : len(ranked) - third]
    count = at_most - 2 * third
    picked = sorted(np.random.default_rng([seed, 1]).permutation(len(between))[:count].tolist())
    return [
        *(("among the best by z", row) for row in best),
        *(("drawn at random", between[place]) for place in picked),
        *(("among the weakest by z", row) for row in weakest),
    ]


def select_samples_to_show(rates: Sequence[float | None], names: Sequence[str], at_most: int) -> list[int]:
    """Indices of the items whose drawings are shown, best win rate first; if there are too many, evenly spread over that
    order, so that good, middling and bad ones are shown alike."""
    order = sorted(range(len(names)), key=lambda item: (-_or_last(rates[item]), names[item]))
    if len(order) <= at_most:
        return order
    if at_most == 0:
        return []
    places = sorted({int(place) for place in np.floor(np.linspace(0, len(order) - 1, at_most))})
    return [order[place] for place in places]


def _or_last(rate: float | None) -> float:
    return -1.0 if rate is None else rate
