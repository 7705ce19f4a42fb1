"""Headline metrics and the files of `dvc plots`, from an evaluation as `evaluation.json` holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline_steps.evaluate.evaluation_plan import EvalAudio, EvalPair, EvaluationPlan
from pipeline_steps.evaluate.report.dvc_plots import MAX_POINTS, ability_tables, sample_grids, training_rows, win_rate_rows
from pipeline_steps.evaluate.report.headline_metrics import chance_warnings, headline_metrics


def entry(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "n": 24, "clusters": 13}


def evaluation(low: float | None) -> dict[str, Any]:
    model = {"win_rate_j": entry(0.6, low, 0.7), "kid_j": entry(0.03, 0.01, 0.05), "ais_win_rate_a_j": entry(None)}
    lookup = {"win_rate_j": entry(-0.2, -0.3, -0.1)}
    rows = {"model": model, "unconditional": {"win_rate_j": entry(0.5)}, "model_minus_nearest_training_image": lookup}
    curve = [{"at": at, **entry(value)} for at, value in ((6.0, 0.4), (-6.0, 0.2))]
    sweep = {"applicable": True, "sweep": {"curve": curve}, "controls": {"flat": {"curve": curve[:1]}}}
    return {
        "test": {"rows": rows, "n_sounds": 13},
        "retrieval": {"rows": {"pipeline": {"recall_at_10": entry(0.5, 0.4, 0.6)}}},
        "abilities": {"loudness": sweep, "words": {"applicable": False}},
    }


def test_headline_metrics_are_numbers_with_intervals() -> None:
    found = headline_metrics(evaluation(0.55), "j", "a", 153, 619)
    assert found == {
        "test": {
            "win_rate": 0.6, "win_rate_low": 0.55, "win_rate_high": 0.7, "kid": 0.03, "kid_low": 0.01, "kid_high": 0.05,
            "gain_over_lookup": -0.2, "gain_over_lookup_low": -0.3, "gain_over_lookup_high": -0.1, "clips": 13,
        },
        "retrieval": {"recall_at_10": 0.5, "recall_at_10_low": 0.4, "recall_at_10_high": 0.6},
        "pairs": {"count": 153, "coverage": 0.247173},
    }  # fmt: skip
    assert chance_warnings(found) == []


@pytest.mark.parametrize("low", [0.5, 0.45, None])
def test_win_rate_that_may_be_chance_is_a_warning(low: float | None) -> None:
    (warning,) = chance_warnings(headline_metrics(evaluation(low), "j", "a", 1, 0))
    assert warning.startswith("test: the win rate 0.60")
    assert "not above chance (0.5)" in warning


def test_too_few_pairs_to_judge_are_a_warning() -> None:
    found = headline_metrics({"judges": {}, "warnings": [], "abilities": {}}, "j", "a", 2, 4)
    assert found == {"pairs": {"count": 2, "coverage": 0.5}}
    assert chance_warnings(found) == ["no win rate was measured, so nothing shows that the model uses the audio"]


def test_rows_of_the_plots() -> None:
    found = evaluation(0.55)
    assert [(row["row"], row["win_rate"]) for row in win_rate_rows(found, "j")] == [
        ("test: model", 0.6),
        ("test: unconditional", 0.5),
    ]
    assert ability_tables(found["abilities"]) == {
        "loudness": [{"at": -6.0, "model": 0.2}, {"at": 6.0, "model": 0.4, "control": 0.4}],
        "words": [],
    }
    rows = training_rows({"loss": [(step + 1, float(step)) for step in range(10 * MAX_POINTS)]})
    assert len(rows) == MAX_POINTS
    assert rows[0] == {"step": 10, "training_loss": 4.5}
    assert training_rows({}) == []


def test_sample_grid_has_a_row_for_each_pair_and_no_empty_tile() -> None:
    pairs = tuple(EvalPair(f"p{number}", f"i{number}", "g", number) for number in range(3))
    plan = EvaluationPlan(tuple(EvalAudio(f"c{number}", "g", None) for number in range(3)), {"test": pairs, "gold": ()})
    generated = np.full((3, 2, 8, 8, 3), 100, np.uint8)
    grids = sample_grids(plan, generated, lambda _: np.zeros((5, 9, 3), np.uint8))
    assert set(grids) == {"test"}
    grid = grids["test"]
    for row in range(3):
        tiles = [grid[row * 14 : row * 14 + 8, column * 10 : column * 10 + 8] for column in range(3)]
        assert [int(tile.max()) for tile in tiles] == [0, 100, 100]
