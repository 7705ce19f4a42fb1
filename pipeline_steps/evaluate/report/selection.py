"""Selection of the pairs and samples that the report shows, by rules that the page states. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline_steps.evaluate.evaluation_plan import evenly_spaced_indices


def select_pairs_to_show(
    pairs: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], at_most: int, seed: int
) -> list[tuple[str, Mapping[str, Any]]]:
    """At most `at_most` pairs as (reason, row): the best third, the weakest third, and random pairs between them.

    The order is that of z times the confidence of the image's event, because a sound can match a doubtful caption very well.
    Ties are broken by pair id, so the selection is a function of the tables and the seed.
    """
    confidence = {(event["image_id"], event["phrase"]): float(event["confidence"]) for event in events}

    def value(pair: Mapping[str, Any]) -> float:
        return float(pair["z_score"]) * confidence.get((pair["image_id"], pair["tracks"][0]["phrase"]), 1.0)

    ranked = sorted(pairs, key=lambda row: (-value(row), str(row["pair_id"])))
    if len(ranked) <= at_most:
        return [("all pairs, best first", row) for row in ranked]
    third = at_most // 3
    best, weakest = ranked[:third], ranked[len(ranked) - third :]
    between = ranked[third : len(ranked) - third]
    count = at_most - 2 * third
    picked = sorted(np.random.default_rng([seed, 1]).permutation(len(between))[:count].tolist())
    return [
        *(("among the best", row) for row in best),
        *(("selected at random", between[index]) for index in picked),
        *(("among the weakest", row) for row in weakest),
    ]


def select_samples_to_show(rates: Sequence[float | None], names: Sequence[str], at_most: int) -> list[int]:
    """Indices of at most `at_most` pairs whose samples are shown, best win rate first.

    If there are more pairs, the selection is evenly spaced over that order.
    """
    order = sorted(range(len(names)), key=lambda pair: (-(-1.0 if (rate := rates[pair]) is None else rate), names[pair]))
    return [order[index] for index in evenly_spaced_indices(len(order), at_most, include_last=True)]
