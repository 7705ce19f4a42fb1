"""Retrieval metrics: ranks compared with enumeration, the random row with simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_steps.evaluate.ground_truth import GoldPair
from pipeline_steps.evaluate.retrieval.gold_retrieval import EmbeddingTable, gold_retrieval
from pipeline_steps.evaluate.retrieval.metrics import random_summary, ranks, score_by_events, summary


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.data())
def test_rank_is_the_mean_place_over_all_orders_of_ties(row: list[int], data: st.DataObject) -> None:
    target = data.draw(st.integers(0, len(row) - 1))
    better = sum(value > row[target] for value in row)
    equal = sum(value == row[target] for value in row)
    expected = np.mean([better + place for place in range(1, equal + 1)])
    assert ranks(np.array([row], float), [target])[0] == pytest.approx(expected)


def test_a_query_without_scores_ranks_in_the_middle() -> None:
    scores = np.vstack([np.full(9, np.nan), np.arange(9.0)])
    assert ranks(scores, [0, 8]).tolist() == [5.0, 1.0]


def test_the_random_row_equals_the_simulated_expectation() -> None:
    rng = np.random.default_rng(0)
    rank = ranks(rng.normal(size=(4000, 50)), rng.integers(0, 50, 4000).tolist())
    expected = random_summary(50, 71)
    found = summary(rank, [str(row) for row in range(4000)], 50, 0)
    for name in ("recall_at_1", "recall_at_5", "recall_at_10", "mrr"):
        assert found[name].value == pytest.approx(expected[name].value, abs=0.02)
    assert found["median_rank"].value == pytest.approx(expected["median_rank"].value, abs=2)
    assert random_summary(3, 5)["recall_at_10"].value == 1.0


def test_summary_of_known_ranks() -> None:
    found = summary(np.array([1.0, 2.0, 6.0, 20.0]), list("abcd"), 200, 0)
    assert found["recall_at_1"].value == 0.25
    assert found["recall_at_5"].value == 0.5
    assert found["recall_at_10"].value == 0.75
    assert found["mrr"].value == pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 20) / 4)
    assert found["median_rank"].value == 4.0
    low, high = found["median_rank"].low, found["median_rank"].high
    assert low is not None
    assert high is not None
    assert low <= 4.0 <= high


def test_event_scores_are_weighted_means() -> None:
    similarity = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert score_by_events(similarity, [3.0, 1.0]).tolist() == [0.75, 0.25]
    assert score_by_events(similarity, [0.0, 0.0]).tolist() == [0.5, 0.5]


def test_a_gold_pair_without_a_label_has_no_class() -> None:
    """It counts in the pipeline's row, but neither as seen nor as unseen, and there is no label to ask the oracle with."""
    vectors = np.eye(3, dtype=np.float32)
    space = EmbeddingTable(vectors, {"t0": 0}, vectors, {f"S{n}": n for n in range(3)})
    groups = {f"S{n}": f"g{n}" for n in range(3)}
    pairs = [GoldPair(f"p{n}", f"I{n}", f"S{n}", label) for n, label in enumerate(("dog", "cow", None))]
    found = gold_retrieval(pairs, space, {}, {"dog": vectors[0], "cow": vectors[2]}, frozenset({"dog"}), groups, 50, 0)
    assert found is not None
    counts = {name: row["mrr"].n for name, row in found["rows"].items()}
    assert counts == {"pipeline": 3, "pipeline_seen": 1, "pipeline_unseen": 1, "label_oracle": 2, "random": 3}
    assert [row["oracle_rank"] for row in found["ranks"]] == [1.0, 2.5, None]
    without_labels = gold_retrieval(pairs[2:], space, {}, None, frozenset({"dog"}), groups, 50, 0)
    assert without_labels is not None
    assert list(without_labels["rows"]) == ["pipeline", "random"]
