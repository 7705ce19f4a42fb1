"""Pairing from tables in memory to rows: candidates, splits, assignment, pairs and abstentions. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline_steps.core.array_types import BoolArray, FloatArray, IntArray
from pipeline_steps.core.hashing import text_id
from pipeline_steps.pair.assignment import Assignment, Edges, solve_assignment
from pipeline_steps.pair.candidates import (
    Candidates,
    EventArrays,
    NeighborArrays,
    build_candidates,
    normalize_scores,
    rank_within,
)
from pipeline_steps.pair.config import PairConfig
from pipeline_steps.pair.eligibility import EligibleItems, eligible_audio, eligible_images, event_arrays, neighbor_arrays
from pipeline_steps.pair.release.license_terms import strictest
from pipeline_steps.pair.reuse_stats import entropy_bits, reuse_metrics
from pipeline_steps.pair.splits import SPLITS, audio_splits, image_splits

Row = dict[str, Any]

KIND_RANKS = 5
"""A clip is of the kinds of the texts that have it among their best five neighbors above the threshold."""


@dataclass(frozen=True, slots=True)
class PairingInputs:
    """Tables of earlier stages, vector [D] of each audio id, and the z-score that a match must reach."""

    images: Sequence[Mapping[str, Any]]
    audio: Sequence[Mapping[str, Any]]
    events: pa.Table
    neighbors: pa.Table
    vectors: Mapping[str, FloatArray]
    z_threshold: float


@dataclass(frozen=True, slots=True)
class PairingResult:
    """Rows of the pairs and of this stage's abstentions, and metrics."""

    pairs: list[Row]
    abstained: list[Row]
    metrics: dict[str, Any]


def pair_images_with_audio(inputs: PairingInputs, config: PairConfig) -> PairingResult:
    """Pair images with pool audio. Every image that has events and is not held out is in `pairs` or in `abstained`."""
    audio = eligible_audio(inputs.audio, inputs.vectors, config.audio_duplicate_cosine, config.license_policy)
    images = eligible_images(inputs.images, set(inputs.events["image_id"].to_pylist()), config.license_policy)
    neighbors, texts = neighbor_arrays(inputs.neighbors, audio)
    events, described = event_arrays(inputs.events, images, texts, config.min_confidence, config.event_weight_exponent)
    admissible = neighbors.z_score >= inputs.z_threshold
    value = normalize_scores(neighbors, admissible)
    candidates = build_candidates(events, neighbors, value, admissible, config.event_pooling, config.num_candidates)
    audio_split, image_split = _splits(candidates, events, neighbors, admissible, audio, images, config)
    in_split = candidates.where(image_split[candidates.image] == audio_split[candidates.audio])
    solved = _assign(in_split, audio, len(images.ids), config)
    edges = solved.edge[solved.edge >= 0]
    pairs = [
        _pair(edge, in_split, images, audio, described, neighbors, SPLITS[int(image_split[in_split.image[edge]])], config)
        for edge in edges.tolist()
    ]
    abstained = _abstentions(images, events, neighbors, candidates, in_split, solved, inputs.z_threshold)
    n_clips, n_images = len(audio.ids), sum(not row["holdout"] for row in inputs.images)
    metrics: dict[str, Any] = {
        "z_threshold": round(inputs.z_threshold, 6) if np.isfinite(inputs.z_threshold) else None,
        "pool_sounds": n_clips,
        "sound_groups": len(set(audio.groups)),
        "sounds_excluded": dict(sorted(Counter(code for code, _ in audio.rejected.values()).items())),
        "candidate_edges": len(candidates),
        "solver": solved.solver,
        "total_value": round(solved.total, 6),
        "value_gap_bound": round(solved.gap, 6),
        "top1_baseline": reuse_metrics(_top1(events, neighbors), n_clips, n_images),
        "assignment": reuse_metrics(in_split.audio[edges], n_clips, n_images),
        "audio_entropy_bits": round(entropy_bits(pair["tracks"][0]["phrase"] for pair in pairs), 4),
        "abstained_by_code": dict(sorted(Counter(row["code"] for row in abstained).items())),
        "first_choice_ratio": round(_first_choice_ratio(candidates, in_split, edges, len(images.ids)), 6),
    }
    return PairingResult(pairs, abstained, metrics)


def _splits(
    candidates: Candidates,
    events: EventArrays,
    neighbors: NeighborArrays,
    admissible: BoolArray,
    audio: EligibleItems,
    images: EligibleItems,
    config: PairConfig,
) -> tuple[IntArray, IntArray]:
    """Index into SPLITS of every clip [A] and every image [P]; audio groups first, then image groups."""
    fractions = config.splits
    audio_kinds = _audio_kinds(neighbors, admissible, audio)
    by_group = audio_splits(sorted(set(audio.groups)), audio_kinds, config.seed, fractions.audio.test, fractions.audio.val)
    audio_split = np.array([SPLITS.index(by_group[group]) for group in audio.groups], dtype=np.int64)
    best: dict[str, dict[str, float]] = {group: {} for group in sorted(set(images.groups))}
    key = candidates.image * len(SPLITS) + audio_split[candidates.audio]
    order = np.lexsort((-candidates.value, key))
    for edge in order[rank_within(key[order]) == 0].tolist():
        found = best[images.groups[int(candidates.image[edge])]]
        split = SPLITS[int(audio_split[candidates.audio[edge]])]
        found[split] = max(found.get(split, 0.0), float(candidates.value[edge]))
    kinds: dict[str, set[str]] = {}
    for edge in np.flatnonzero(rank_within(candidates.image) == 0).tolist():
        text = str(events.text[candidates.event[edge]])
        kinds.setdefault(images.groups[int(candidates.image[edge])], set()).add(text)
    by_image = image_splits(
        best, kinds, config.seed, fractions.image.test, fractions.image.val, config.min_relative_value_in_split
    )
    return audio_split, np.array([SPLITS.index(by_image[group]) for group in images.groups], dtype=np.int64)


def _audio_kinds(neighbors: NeighborArrays, admissible: BoolArray, audio: EligibleItems) -> dict[str, set[str]]:
    """Kinds of each audio group: texts with one of its clips among their first `KIND_RANKS` admissible neighbors."""
    text = np.repeat(np.arange(len(neighbors.starts) - 1), np.diff(neighbors.starts))
    rows = np.flatnonzero(admissible)
    rows = rows[np.lexsort((-neighbors.corrected_score[rows], text[rows]))]
    kinds: dict[str, set[str]] = {}
    for row in rows[rank_within(text[rows]) < KIND_RANKS].tolist():
        kinds.setdefault(audio.groups[int(neighbors.audio[row])], set()).add(str(text[row]))
    return kinds


def _assign(in_split: Candidates, audio: EligibleItems, n_images: int, config: PairConfig) -> Assignment:
    """Assignment of images to audio groups; the edge of (image, group) is the image's best clip of the group."""
    names = {group: index for index, group in enumerate(sorted(set(audio.groups)))}
    group = np.array([names[group] for group in audio.groups], dtype=np.int64)[in_split.audio]
    key = in_split.image * len(names) + group
    order = np.lexsort((in_split.audio, -in_split.value, key))
    edge = np.sort(order[rank_within(key[order]) == 0])
    edges = Edges(in_split.image[edge], group[edge], in_split.value[edge], n_images, len(names))
    solved = solve_assignment(edges, config.max_reuse, config.exact_solver_max_edges, config.auction_epsilon)
    chosen = np.where(solved.edge >= 0, edge[solved.edge] if len(edge) else -1, -1)
    return replace(solved, edge=chosen)


def _top1(events: EventArrays, neighbors: NeighborArrays) -> IntArray:
    """Top-1 baseline: the clip with the highest raw score for each image's first event, without calibration or cap."""
    text = events.text[rank_within(events.image) == 0]
    text = text[neighbors.starts[text + 1] > neighbors.starts[text]]
    bounds = zip(neighbors.starts[text].tolist(), neighbors.starts[text + 1].tolist(), strict=True)
    best = [neighbors.audio[start + int(np.argmax(neighbors.score[start:end]))] for start, end in bounds]
    return np.array(best, dtype=np.int64)


def _first_choice_ratio(candidates: Candidates, in_split: Candidates, edges: IntArray, n_images: int) -> float:
    """Fraction of paired images whose clip is their best candidate over all splits."""
    first = np.full(n_images, -1, dtype=np.int64)
    top = rank_within(candidates.image) == 0
    first[candidates.image[top]] = candidates.audio[top]
    return float((in_split.audio[edges] == first[in_split.image[edges]]).mean()) if len(edges) else 0.0


def _pair(
    edge: int,
    in_split: Candidates,
    images: EligibleItems,
    audio: EligibleItems,
    described: Sequence[Mapping[str, Any]],
    neighbors: NeighborArrays,
    split: str,
    config: PairConfig,
) -> Row:
    """Row of the pairs table for one chosen edge."""
    image = images.rows[images.ids[int(in_split.image[edge])]]
    index, row = int(in_split.audio[edge]), int(in_split.row[edge])
    clip, event = audio.rows[audio.ids[index]], described[int(in_split.event[edge])]
    gain = loudness_gain_db(float(clip["lufs"]), config.target_lufs, config.max_gain_db)
    return {
        "pair_id": text_id(f"{image['image_id']}:{clip['audio_id']}"),
        "image_id": image["image_id"],
        "tracks": [{"audio_id": clip["audio_id"], "phrase": event["phrase"], "gain_db": gain}],
        "score": float(neighbors.corrected_score[row]),
        "z_score": float(neighbors.z_score[row]),
        "license": strictest((image["license"], clip["license"])),
        "image_license": image["license"],
        "audio_license": clip["license"],
        "image_group": image["group_id"],
        "audio_group": audio.groups[index],
        "split": split,
        "distance": event["distance"],
        "space": event["space"],
    }


def loudness_gain_db(lufs: float, target: float | None, bound: float) -> float:
    """Gain in dB that brings a clip of `lufs` to `target`, within +-`bound`; 0 without a target or for silence."""
    if target is None or not np.isfinite(lufs):
        return 0.0
    return float(np.clip(target - lufs, -bound, bound))


def _abstentions(
    images: EligibleItems,
    events: EventArrays,
    neighbors: NeighborArrays,
    candidates: Candidates,
    in_split: Candidates,
    solved: Assignment,
    z_threshold: float,
) -> list[Row]:
    """Rows of images without a pair: code, reason, and best z-score."""
    n = len(images.ids)
    best_z = np.full(n, -np.inf)
    top = np.full(max(len(neighbors.starts) - 1, 0), -np.inf)
    text = np.repeat(np.arange(len(top)), np.diff(neighbors.starts))
    np.maximum.at(top, text, neighbors.z_score)
    np.maximum.at(best_z, events.image, top[events.text])
    has_event, has_candidate, has_match_in_split = (
        np.bincount(image, minlength=n) > 0 for image in (events.image, candidates.image, in_split.image)
    )
    rows: list[Row] = []
    for index in np.flatnonzero(solved.edge < 0).tolist():
        z = float(best_z[index])
        if not has_event[index]:
            code, reason = "NO_CANDIDATE", "no event is confident enough, or none was retrieved"
        elif not np.isfinite(z):
            code, reason = "NO_CANDIDATE", "none of the sounds retrieved for its events may be paired"
        elif not has_candidate[index]:
            code, reason = "BELOW_NULL", f"best z {z:.3f} is below {z_threshold:.3f}, which random sounds reach as well"
        elif not has_match_in_split[index]:
            code, reason = "NO_CANDIDATE_IN_SPLIT", f"best z {z:.3f}, but no sound of its split is above the null"
        else:
            code, reason = "CAPACITY", f"best z {z:.3f}, but its sounds are taken up to pair.max_reuse by better matches"
        rows.append(_abstention(images.ids[index], code, reason, z if np.isfinite(z) else None))
    return rows + [_abstention(name, code, reason, None) for name, (code, reason) in images.rejected.items()]


def _abstention(image_id: str, code: str, reason: str, score: float | None) -> Row:
    return {"image_id": image_id, "stage": "pair", "code": code, "reason": reason, "score": score}
