"""The whole decision, from tables in memory to rows: candidates -> splits -> assignment -> pairs and abstentions. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline_steps.core.array_types import BoolArray, IntArray
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
from pipeline_steps.pair.eligibility import (
    EligibleAudio,
    EligibleImages,
    eligible_audio,
    eligible_images,
    event_arrays,
    neighbor_arrays,
)
from pipeline_steps.pair.release.license_terms import strictest
from pipeline_steps.pair.reuse_stats import entropy_bits, reuse_metrics
from pipeline_steps.pair.splits import SPLITS, image_splits, sound_splits

Row = dict[str, Any]

KIND_RANKS = 5
"""A sound is of the kinds of the texts that list it among their best five above the null."""


@dataclass(frozen=True, slots=True)
class PairingInputs:
    """Tables as the stages before wrote them; `vectors` maps an audio id to its embedding [D], `null_z` is the threshold."""

    images: Sequence[Mapping[str, Any]]
    audio: Sequence[Mapping[str, Any]]
    events: pa.Table
    neighbors: pa.Table
    vectors: Mapping[str, npt.NDArray[np.float32]]
    null_z: float


@dataclass(frozen=True, slots=True)
class PairingResult:
    """Rows of the pairs and of this stage's abstentions, and what was measured on the way."""

    pairs: list[Row]
    abstained: list[Row]
    metrics: dict[str, Any]


def pair_images_with_audio(inputs: PairingInputs, config: PairConfig) -> PairingResult:
    """Pair pictures with pool sounds. Every picture with events that is not held out ends in `pairs` or in `abstained`."""
    sounds = eligible_audio(inputs.audio, inputs.vectors, config.audio_duplicate_cosine, config.license_policy)
    pictures = eligible_images(inputs.images, set(inputs.events["image_id"].to_pylist()), config.license_policy)
    neighbors, texts = neighbor_arrays(inputs.neighbors, sounds)
    events, phrases = event_arrays(inputs.events, pictures, texts, config.min_confidence, config.event_weight_exponent)
    admissible = neighbors.z >= inputs.null_z
    value = normalize_scores(neighbors, admissible)
    candidates = build_candidates(events, neighbors, value, admissible, config.event_pooling, config.num_candidates)
    sound_split, picture_split = _splits(candidates, events, neighbors, admissible, sounds, pictures, config)
    inside = candidates.where(picture_split[candidates.picture] == sound_split[candidates.sound])
    solved = _assign(inside, sounds, len(pictures.ids), config)
    pairs = [
        _pair(edge, inside, pictures, sounds, phrases, neighbors, SPLITS[int(picture_split[inside.picture[edge]])], config)
        for edge in solved.edge[solved.edge >= 0].tolist()
    ]
    abstained = _abstentions(pictures, events, neighbors, candidates, inside, solved, inputs.null_z)
    greedy = _greedy(events, neighbors)
    chosen = inside.sound[solved.edge[solved.edge >= 0]]
    n = sum(not row["holdout"] for row in inputs.images)
    metrics: dict[str, Any] = {
        "z_threshold": round(inputs.null_z, 6) if np.isfinite(inputs.null_z) else None,
        "pool_sounds": len(sounds.ids),
        "sound_groups": len(set(sounds.groups)),
        "sounds_excluded": sounds.excluded,
        "candidate_edges": len(candidates),
        "solver": solved.solver,
        "total_value": round(solved.total, 6),
        "value_gap_bound": round(solved.gap, 6),
        "top1_baseline": reuse_metrics(greedy, len(sounds.ids), n),
        "assignment": reuse_metrics(chosen, len(sounds.ids), n),
        "audio_entropy_bits": round(entropy_bits(pair["tracks"][0]["phrase"] for pair in pairs), 4),
        "abstained_by_code": dict(sorted(Counter(row["code"] for row in abstained).items())),
        "first_choice_ratio": round(_first_choice(candidates, inside, solved), 6),
    }
    return PairingResult(pairs, abstained, metrics)


def _splits(
    candidates: Candidates,
    events: EventArrays,
    neighbors: NeighborArrays,
    admissible: BoolArray,
    sounds: EligibleAudio,
    pictures: EligibleImages,
    config: PairConfig,
) -> tuple[IntArray, IntArray]:
    """Index into SPLITS of every sound [A] and every picture [P]; sound groups first, then picture groups."""
    names = sorted(set(sounds.groups))
    heard_as = _kinds(neighbors, admissible, sounds)
    by_group = sound_splits(names, heard_as, config.seed, config.splits.audio.test, config.splits.audio.val)
    sound_split = np.array([SPLITS.index(by_group[group]) for group in sounds.groups], dtype=np.int64)
    best: dict[str, dict[str, float]] = {group: {} for group in sorted(set(pictures.groups))}
    key = candidates.picture * len(SPLITS) + sound_split[candidates.sound]
    order = np.lexsort((-candidates.value, key))
    for edge in order[rank_within(key[order]) == 0].tolist():
        found = best[pictures.groups[int(candidates.picture[edge])]]
        split = SPLITS[int(sound_split[candidates.sound[edge]])]
        found[split] = max(found.get(split, 0.0), float(candidates.value[edge]))
    kinds: dict[str, set[str]] = {}
    for edge in np.flatnonzero(rank_within(candidates.picture) == 0).tolist():
        text = str(events.text[candidates.event[edge]])
        kinds.setdefault(pictures.groups[int(candidates.picture[edge])], set()).add(text)
    shares = (config.splits.image.test, config.splits.image.val)
    by_picture = image_splits(best, kinds, config.seed, *shares, config.min_relative_value_in_split)
    return sound_split, np.array([SPLITS.index(by_picture[group]) for group in pictures.groups], dtype=np.int64)


def _kinds(neighbors: NeighborArrays, admissible: BoolArray, sounds: EligibleAudio) -> dict[str, set[str]]:
    """Kinds of each sound group: the texts that list one of its sounds among their first `KIND_RANKS` above the null."""
    text = np.repeat(np.arange(len(neighbors.starts) - 1), np.diff(neighbors.starts))
    rows = np.flatnonzero(admissible)
    rows = rows[np.lexsort((-neighbors.damped[rows], text[rows]))]
    kinds: dict[str, set[str]] = {}
    for row in rows[rank_within(text[rows]) < KIND_RANKS].tolist():
        kinds.setdefault(sounds.groups[int(neighbors.sound[row])], set()).add(str(text[row]))
    return kinds


def _assign(inside: Candidates, sounds: EligibleAudio, n_pictures: int, config: PairConfig) -> Assignment:
    """Solve over groups of sounds; each (picture, group) is represented by the picture's best sound of the group."""
    names = {group: index for index, group in enumerate(sorted(set(sounds.groups)))}
    group = np.array([names[group] for group in sounds.groups], dtype=np.int64)[inside.sound]
    key = inside.picture * len(names) + group
    order = np.lexsort((inside.sound, -inside.value, key))
    edge = np.sort(order[rank_within(key[order]) == 0])
    edges = Edges(inside.picture[edge], group[edge], inside.value[edge], n_pictures, len(names))
    solved = solve_assignment(edges, config.max_reuse, config.exact_solver_max_edges, config.auction_epsilon)
    chosen = np.where(solved.edge >= 0, edge[solved.edge] if len(edge) else -1, -1)
    return Assignment(chosen, solved.total, solved.gap, solved.solver)


def _greedy(events: EventArrays, neighbors: NeighborArrays) -> IntArray:
    """Plain top-1: the sound with the highest undamped score for each picture's first event; no calibration, no cap."""
    text = events.text[rank_within(events.picture) == 0]
    text = text[neighbors.starts[text + 1] > neighbors.starts[text]]
    return np.array(
        [
            neighbors.sound[start + int(np.argmax(neighbors.score[start:end]))]
            for start, end in zip(neighbors.starts[text].tolist(), neighbors.starts[text + 1].tolist(), strict=True)
        ],
        dtype=np.int64,
    )


def _first_choice(candidates: Candidates, inside: Candidates, solved: Assignment) -> float:
    """Share of paired pictures that got the sound they value most, over all splits."""
    first = np.full(len(solved.edge), -1, dtype=np.int64)
    top = rank_within(candidates.picture) == 0
    first[candidates.picture[top]] = candidates.sound[top]
    chosen = solved.edge[solved.edge >= 0]
    return float((inside.sound[chosen] == first[inside.picture[chosen]]).mean()) if len(chosen) else 0.0


def _pair(
    edge: int,
    inside: Candidates,
    pictures: EligibleImages,
    sounds: EligibleAudio,
    phrases: Sequence[str],
    neighbors: NeighborArrays,
    split: str,
    config: PairConfig,
) -> Row:
    image = pictures.rows[pictures.ids[int(inside.picture[edge])]]
    index, row = int(inside.sound[edge]), int(inside.row[edge])
    audio = sounds.rows[sounds.ids[index]]
    gain = loudness_gain_db(float(audio["lufs"]), config.target_lufs, config.max_gain_db)
    return {
        "pair_id": text_id(f"{image['image_id']}:{audio['audio_id']}"),
        "image_id": image["image_id"],
        "tracks": [{"audio_id": audio["audio_id"], "phrase": phrases[int(inside.event[edge])], "gain_db": gain}],
        "score": float(neighbors.damped[row]),
        "z_score": float(neighbors.z[row]),
        "license": strictest((image["license"], audio["license"])),
        "image_license": image["license"],
        "audio_license": audio["license"],
        "image_group": image["group_id"],
        "audio_group": sounds.groups[index],
        "split": split,
    }


def loudness_gain_db(lufs: float, target: float | None, bound: float) -> float:
    """Gain in dB that brings a sound of `lufs` to `target`, within +-`bound`; 0 without a target or for silence."""
    if target is None or not np.isfinite(lufs):
        return 0.0
    return float(np.clip(target - lufs, -bound, bound))


def _abstentions(
    pictures: EligibleImages,
    events: EventArrays,
    neighbors: NeighborArrays,
    candidates: Candidates,
    inside: Candidates,
    solved: Assignment,
    null_z: float,
) -> list[Row]:
    """One row for every picture without a pair: why, and the best z it had."""
    n = len(pictures.ids)
    best_z = np.full(n, -np.inf)
    top = np.full(max(len(neighbors.starts) - 1, 0), -np.inf)
    text = np.repeat(np.arange(len(top)), np.diff(neighbors.starts))
    np.maximum.at(top, text, neighbors.z)
    np.maximum.at(best_z, events.picture, top[events.text])
    has_event = np.bincount(events.picture, minlength=n) > 0
    has_candidate = np.bincount(candidates.picture, minlength=n) > 0
    has_inside = np.bincount(inside.picture, minlength=n) > 0
    rows: list[Row] = []
    for index in np.flatnonzero(solved.edge < 0).tolist():
        z = float(best_z[index])
        if not has_event[index]:
            code, reason = "NO_CANDIDATE", "no event is confident enough, or none was retrieved"
        elif not np.isfinite(z):
            code, reason = "NO_CANDIDATE", "none of the sounds retrieved for its events may be paired"
        elif not has_candidate[index]:
            code, reason = "BELOW_NULL", f"best z {z:.3f} is below {null_z:.3f}, which random sounds reach as well"
        elif not has_inside[index]:
            code, reason = "NO_CANDIDATE_IN_SPLIT", f"best z {z:.3f}, but no sound of its split is above the null"
        else:
            code, reason = "CAPACITY", f"best z {z:.3f}, but its sounds are taken up to pair.max_reuse by better matches"
        score = z if np.isfinite(z) else None
        rows.append({"image_id": pictures.ids[index], "stage": "pair", "code": code, "reason": reason, "score": score})
    for name, (code, reason) in pictures.refused.items():
        rows.append({"image_id": name, "stage": "pair", "code": code, "reason": reason, "score": None})
    return rows
