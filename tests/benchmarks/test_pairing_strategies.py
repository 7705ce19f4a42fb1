"""Pairing strategies on a pool of three images and four clips."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from benchmarks.pairing_strategies import STRATEGIES, PairingPool, measure_pairs, pair, table

LABELS = {"dog1": "dog", "dog2": "dog", "cat1": "cat", "bark": "dog", "meow": "cat", "purr": "cat", "bell": "bell"}
CLIPS = ["bark", "bell", "meow", "purr"]
COSINES = {"barking": [0.9, 0.2, 0.1, 0.0], "meowing": [0.3, 0.1, 0.8, 0.7], "purring": [0.0, 0.1, 0.5, 0.9]}
EVENTS = {"dog1": ["barking"], "dog2": ["barking"], "cat1": ["meowing", "purring"]}


@pytest.fixture
def pool() -> PairingPool:
    own = {
        image: {"image_id": image, "tracks": [{"audio_id": clip, "gain_db": 0.0}]}
        for image, clip in (("dog1", "bark"), ("dog2", "bell"), ("cat1", "meow"))
    }
    names = sorted(set(LABELS.values()))
    return PairingPool(
        own=own,
        other=[],
        held_out=[],
        groups={"bark": "a", "bell": "b", "meow": "c", "purr": "d"},
        clips=CLIPS,
        events={
            image: [{"text_id": text, "salience": 0.8 / 4**rank, "confidence": 1.0} for rank, text in enumerate(texts)]
            for image, texts in EVENTS.items()
        },
        cosine={text: np.array(row, np.float32) for text, row in COSINES.items()},
        corrected={(text, clip): value for text, row in COSINES.items() for clip, value in zip(CLIPS, row, strict=True)},
        labels=LABELS,
        similarity={(a, b): float(a == b) for a in names for b in names},
        vectors={},
        max_reuse=1,
    )


def test_only_the_clips_differ_between_strategies(pool: PairingPool) -> None:
    for strategy in STRATEGIES:
        pairs = pair(pool, strategy, 0)
        assert pairs.keys() == pool.own.keys()
        assert {clip for tracks in pairs.values() for clip, _ in tracks} <= set(CLIPS)
        assert pairs == pair(pool, strategy, 0)
    assert pair(pool, "random", 0) != pair(pool, "random", 1)


def test_top1_repeats_a_clip_and_greedy_does_not(pool: PairingPool) -> None:
    assert [tracks[0][0] for _, tracks in sorted(pair(pool, "top1", 0).items())] == ["meow", "bark", "bark"]
    greedy = Counter(tracks[0][0] for tracks in pair(pool, "greedy", 0).values())
    assert max(greedy.values()) == 1
    assert greedy["bark"] == greedy["meow"] == 1


def test_further_events_bring_softer_clips_of_other_groups(pool: PairingPool) -> None:
    several = pair(pool, "several", 0)
    assert several["dog1"] == [("bark", 0.0)], "one event"
    assert several["cat1"] == [("meow", 0.0), ("purr", pytest.approx(-6.02, abs=0.01))], "half the weight"


def test_the_oracle_takes_clips_of_the_class(pool: PairingPool) -> None:
    found = measure_pairs(pool, "class_oracle", pair(pool, "class_oracle", 0))
    assert found["precision"] == found["label cosine"] == 1
    ours = measure_pairs(pool, "ours", pair(pool, "ours", 0))
    assert ours["precision"] == pytest.approx(2 / 3, abs=1e-3)
    assert (ours["images"], ours["clips"], ours["most_used"], ours["recall@10"]) == (3, 3, 1, 1.0)


def test_the_table_has_mean_and_spread_over_the_seeds() -> None:
    rows = [{"strategy": "ours", "seed": seed, "images": 3, "labels": value} for seed, value in enumerate((0.6, 0.7))]
    lines = table(rows).splitlines()
    assert len(lines) == 3
    assert "| ours | 2 | 3 |" in lines[2]
    assert "0.65 ± 0.071" in lines[2]
