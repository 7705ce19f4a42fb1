"""Picture -> sound retrieval on the gold pairs, from the embeddings on disk. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline_steps.core.array_types import FloatArray
from pipeline_steps.evaluate.ground_truth import GoldPair
from pipeline_steps.evaluate.metrics.bootstrap import Estimate
from pipeline_steps.evaluate.retrieval.metrics import random_summary, ranks, score_by_events, summary


@dataclass(frozen=True, slots=True)
class EmbeddingTable:
    """The text-audio space as the stages before left it: unit rows, and the row of each id."""

    texts: FloatArray
    text_row: Mapping[str, int]
    sounds: FloatArray
    sound_row: Mapping[str, int]


def gold_retrieval(
    pairs: Sequence[GoldPair],
    space: EmbeddingTable,
    events: Mapping[str, Sequence[Mapping[str, Any]]],
    label_vectors: Mapping[str, FloatArray] | None,
    seen_classes: frozenset[str],
    groups: Mapping[str, str],
    repeats: int,
    seed: int,
) -> dict[str, Any] | None:
    """R@k, MRR and median rank of the gold pictures' own sounds among all sounds of the space (gold and pool).

    Args:
        pairs: gold pairs; those whose sound has no vector are left out and counted.
        space: vectors; every sound in it is a candidate.
        events: image id -> its events (text_id, salience, confidence); a picture without events ranks as chance would.
        label_vectors: class -> unit vector of its name as a text, for the oracle row; None leaves the row out. A pair whose
            class is not known has no place in it.
        seen_classes: classes that occur in training, reported apart from the other known ones.
        groups: sound group by audio id, the clusters of the intervals.

    Returns:
        {queries, candidates, without_events, without_vector, rows: {row: {metric: Estimate}}, ranks: [...]}; None if no
        gold sound is in the space.
    """
    usable = [pair for pair in pairs if pair.audio_id in space.sound_row]
    if not usable:
        return None
    targets = [space.sound_row[pair.audio_id] for pair in usable]
    clusters = [groups[pair.audio_id] for pair in usable]
    scores = np.full((len(usable), len(space.sounds)), np.nan)
    for row, pair in enumerate(usable):
        listed = [event for event in events.get(pair.image_id, []) if event["text_id"] in space.text_row]
        if listed:
            vectors = space.texts[[space.text_row[event["text_id"]] for event in listed]]
            scores[row] = score_by_events(
                vectors @ space.sounds.T, [event["salience"] * event["confidence"] for event in listed]
            )
    found = ranks(scores, targets)
    rows: dict[str, dict[str, Estimate]] = {"pipeline": summary(found, clusters, repeats, seed)}
    seen = np.array([pair.label in seen_classes for pair in usable])
    labelled = np.array([pair.label is not None for pair in usable])
    oracle = np.full(len(usable), np.nan)
    if label_vectors is not None and labelled.any():
        queries = np.stack([label_vectors[pair.label] for pair in usable if pair.label is not None])
        oracle[labelled] = ranks(queries @ space.sounds.T, [targets[row] for row in np.flatnonzero(labelled)])
    parts = {"pipeline_seen": (found, seen), "pipeline_unseen": (found, labelled & ~seen)}
    parts["label_oracle"] = (oracle, np.isfinite(oracle))
    for name, (rank, mask) in parts.items():
        if mask.any():
            rows[name] = summary(rank[mask], [clusters[row] for row in np.flatnonzero(mask)], repeats, seed)
    rows["random"] = random_summary(len(space.sounds), len(usable))
    return {
        "queries": len(usable),
        "candidates": len(space.sounds),
        "without_events": int(np.isnan(scores).all(1).sum()),
        "without_vector": len(pairs) - len(usable),
        "rows": rows,
        "ranks": [
            {
                "pair": pair.name,
                "label": pair.label,
                "rank": float(rank),
                "oracle_rank": None if np.isnan(best) else float(best),
            }
            for pair, rank, best in zip(usable, found, oracle, strict=True)
        ],
    }


def retrieval_block(found: Mapping[str, Any], space: str, seed: int) -> dict[str, Any]:
    """The block of evaluation.json: counts, and each metric of each row with its interval, n, seed and space."""
    rows = {
        row: {
            metric: {
                "value": round(estimate.value, 6),
                "low": None if estimate.low is None else round(estimate.low, 6),
                "high": None if estimate.high is None else round(estimate.high, 6),
                "n": estimate.n,
                "clusters": estimate.clusters,
                "space": space,
                "seed": seed,
            }
            for metric, estimate in metrics.items()
        }
        for row, metrics in found["rows"].items()
    }
    return {**{name: found[name] for name in ("queries", "candidates", "without_events", "without_vector")}, "rows": rows}
