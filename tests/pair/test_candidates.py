"""Calibration and candidates, compared with plain loops."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from pipeline_steps.core.statistics import gini, skewness
from pipeline_steps.pair import candidates
from pipeline_steps.pair.candidates import (
    EventArrays,
    NeighborArrays,
    build_candidates,
    event_weight,
    normalize_scores,
    null_threshold,
    rank_within,
)
from pipeline_steps.pair.reuse_stats import entropy_bits, reuse_metrics


def make(texts: int = 12, clips: int = 30, k: int = 8, images: int = 20) -> tuple[EventArrays, NeighborArrays]:
    random = np.random.default_rng(5)
    clip = np.concatenate([random.choice(clips, k, replace=False) for _ in range(texts)])
    z = random.normal(2, 2, texts * k)
    neighbors = NeighborArrays(np.arange(texts + 1) * k, clip, z, z, z + 0.1 * random.standard_normal(texts * k))
    counts = random.integers(1, 4, images)
    image = np.repeat(np.arange(images), counts)
    text = np.concatenate([random.choice(texts, count, replace=False) for count in counts])
    return EventArrays(image, text, random.uniform(0.1, 1, len(image))), neighbors


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(("chunk", "span"), [(3, 2**62), (1000, 2**62), (1000, 0)])
def test_candidates_equal_those_of_plain_loops(pooling: str, chunk: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "CHUNK", chunk)
    monkeypatch.setattr(candidates, "KEY_SPAN", span)
    events, neighbors = make()
    admissible = neighbors.z_score >= 1.5
    value = normalize_scores(neighbors, admissible)
    found = build_candidates(events, neighbors, value, admissible, pooling, 5)
    expected: dict[int, dict[int, list[tuple[float, int, int]]]] = defaultdict(lambda: defaultdict(list))
    for event, (image, text) in enumerate(zip(events.image, events.text, strict=True)):
        for row in range(neighbors.starts[text], neighbors.starts[text + 1]):
            if admissible[row]:
                expected[image][neighbors.audio[row]].append((events.weight[event] * value[row], event, row))
    total = np.bincount(events.image, weights=events.weight)
    for image, options in expected.items():
        own = found.where(found.image == image)
        scores = {
            clip: max(hits)[0] if pooling == "max" else sum(hit[0] for hit in hits) / total[image]
            for clip, hits in options.items()
        }
        assert own.value.tolist() == pytest.approx(sorted(scores.values(), reverse=True)[:5])
        for clip, score, event, row in zip(own.audio, own.value, own.event, own.row, strict=True):
            assert scores[clip] == pytest.approx(score)
            assert (event, row) == max(options[clip])[1:]
    assert set(found.image.tolist()) == set(expected)


def test_nothing_admissible_gives_no_candidates() -> None:
    events, neighbors = make()
    none = np.zeros(len(neighbors.z_score), dtype=bool)
    assert len(build_candidates(events, neighbors, normalize_scores(neighbors, none), none, "max", 5)) == 0


def test_a_more_certain_event_has_more_weight() -> None:
    salience, confidence = np.array([1.0, 0.5]), np.array([0.4, 0.2])
    assert event_weight(salience, confidence, 0.5).tolist() == pytest.approx([0.4**0.5, 0.1**0.5])
    assert event_weight(salience, confidence, 0.0).tolist() == [1.0, 1.0]


def test_null_threshold_separates_real_matches_from_chance() -> None:
    random = np.random.default_rng(0)
    audio = random.standard_normal((400, 64)).astype(np.float32)
    audio /= np.linalg.norm(audio, axis=1, keepdims=True)
    chance = random.standard_normal((60, 64)).astype(np.float32)
    chance /= np.linalg.norm(chance, axis=1, keepdims=True)
    threshold = null_threshold(chance, audio, 0.999, 10**6, 0)
    assert threshold == pytest.approx(3.09, abs=0.35), "scores of random vectors are nearly normal"
    assert null_threshold(chance, audio, 0.999, 10**6, 0) == threshold
    assert null_threshold(chance, audio, 0.5, 10**6, 0) == pytest.approx(0, abs=0.05)
    assert null_threshold(chance, audio[:1], 0.9, 1000, 0) == -np.inf, "one clip cannot be compared with random clips"


def test_rank_within() -> None:
    assert rank_within(np.array([7, 7, 9, 9, 9])).tolist() == [0, 1, 0, 1, 2]
    assert rank_within(np.zeros(0, dtype=np.int64)).tolist() == []


def test_reuse_metrics() -> None:
    assert gini(np.array([1, 1, 1, 1])) == 0
    assert gini(np.array([0, 0, 0, 4])) == 0.75
    assert skewness(np.array([2, 2, 2])) == 0
    assert skewness(np.array([0, 0, 0, 8])) == pytest.approx(1.1547, abs=1e-4)
    assert entropy_bits(["a", "b", "c", "d"]) == 2
    assert entropy_bits([]) == 0
    found = reuse_metrics(np.array([0, 0, 0, 1]), n_clips=4, n_images=8)
    assert found["coverage"] == 0.5
    assert found["audio_coverage"] == 0.5
    assert found["max_reuse"] == 3
