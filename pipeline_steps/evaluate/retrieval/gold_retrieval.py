"""Image-to-audio retrieval on the gold pairs, from the embeddings on disk. No I/O."""

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
    """Text-audio embeddings as unit rows, and the row of each id."""

    texts: FloatArray
    text_row: Mapping[str, int]
    audio: FloatArray
    audio_row: Mapping[str, int]


def gold_retrieval(
    pairs: Sequence[GoldPair],
    space: EmbeddingTable,
    events: Sequence[Mapping[str, Any]],
    label_vectors: Mapping[str, FloatArray] | None,
    seen_classes: frozenset[str],
    groups: Mapping[str, str],
    num_bootstrap: int,
    seed: int,
) -> dict[str, Any] | None:
    """R@k, MRR and median rank of the gold audio of each gold image among all audio of the space.

    Args:
        pairs: gold pairs; those whose audio has no embedding are left out and counted.
        space: embeddings; every audio clip in it (gold and pool) is a candidate.
        events: rows of the event table; an image without events ranks as chance would.
        label_vectors: class -> unit embedding of its name, for the row `label_oracle`; None leaves the row out. Pairs of an
            unknown class are not in that row.
        seen_classes: classes that occur in training; pairs of other known classes have a row of their own.
        groups: near-duplicate group by audio id, the clusters of the intervals.
        num_bootstrap: bootstrap resamples.
        seed: of the resampling.

    Returns:
        {queries, candidates, without_events, without_vector, rows: {row: {metric: Estimate}}, ranks: [...]}; None if no gold
        audio is in the space.
    """
    usable = [pair for pair in pairs if pair.audio_id in space.audio_row]
    if not usable:
        return None
    targets = [space.audio_row[pair.audio_id] for pair in usable]
    clusters = [groups[pair.audio_id] for pair in usable]
    scores = np.full((len(usable), len(space.audio)), np.nan)
    events_of: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        if event["text_id"] in space.text_row:
            events_of.setdefault(event["image_id"], []).append(event)
    for row, pair in enumerate(usable):
        if listed := events_of.get(pair.image_id):
            vectors = space.texts[[space.text_row[event["text_id"]] for event in listed]]
            weights = [event["salience"] * event["confidence"] for event in listed]
            scores[row] = score_by_events(vectors @ space.audio.T, weights)
    found = ranks(scores, targets)
    rows: dict[str, dict[str, Estimate]] = {"pipeline": summary(found, clusters, num_bootstrap, seed)}
    seen = np.array([pair.label in seen_classes for pair in usable])
    labeled = np.array([pair.label is not None for pair in usable])
    oracle = np.full(len(usable), np.nan)
    if label_vectors is not None and labeled.any():
        queries = np.stack([label_vectors[pair.label] for pair in usable if pair.label is not None])
        oracle[labeled] = ranks(queries @ space.audio.T, [targets[row] for row in np.flatnonzero(labeled)])
    parts = {
        "pipeline_seen": (found, seen),
        "pipeline_unseen": (found, labeled & ~seen),
        "label_oracle": (oracle, np.isfinite(oracle)),
    }
    for name, (rank, mask) in parts.items():
        if mask.any():
            rows[name] = summary(rank[mask], [clusters[row] for row in np.flatnonzero(mask)], num_bootstrap, seed)
    rows["random"] = random_summary(len(space.audio), len(usable))
    return {
        "queries": len(usable),
        "candidates": len(space.audio),
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
    """Block `retrieval` of `evaluation.json`: counts, and every metric with its interval, n, seed and space."""
    rows = {
        row: {metric: {**estimate.entry(), "space": space, "seed": seed} for metric, estimate in metrics.items()}
        for row, metrics in found["rows"].items()
    }
    return {**{name: found[name] for name in ("queries", "candidates", "without_events", "without_vector")}, "rows": rows}
