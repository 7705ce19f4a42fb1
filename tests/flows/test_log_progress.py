"""Tests of the progress parser."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.log_progress import ProgressParser, duration


def at(times: list[float]) -> ProgressParser:
    ticks = iter(times)
    return ProgressParser(clock=lambda: next(ticks))


def test_lines_of_stages() -> None:
    parser = at([0.0, 10.0, 20.0, 30.0, 31.0])
    first = parser.parse("INFO pipeline_steps.caption.stage: captioned 32 of 640 new pictures")
    assert first is not None
    assert (first.done, first.total, first.rate) == (32, 640, None)
    second = parser.parse("INFO pipeline_steps.caption.stage: captioned 64 of 640 new pictures")
    assert second is not None
    assert second.rate == pytest.approx(3.2)
    assert second.left_s == pytest.approx(180.0)
    assert "64 of 640, 3.2/s, 3 min 00 s left" in str(second)
    other = parser.parse("train: step 182/1700  loss 0.1209  54.1 samples/s  168 s left")
    assert other is not None
    assert (other.done, other.total, other.rate) == (182, 1700, None), "a new series"
    again = parser.parse("train: step 282/1700  loss 0.1209  54.1 samples/s  168 s left")
    assert again is not None
    assert again.rate == pytest.approx(10.0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "loss 0.5",
        "7 of 3 things",
        "see https://example.org/1/2/3",
        "2026/11/23 began",
        "ratio 1/2.5",
        "data/1/22.npy",
        "0 of 0",
    ],
)
def test_lines_without_a_count(line: str) -> None:
    assert ProgressParser().parse(line) is None


@given(st.integers(1, 10**6), st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_progress_is_within_bounds(total: int, done: list[int]) -> None:
    parser = ProgressParser()
    for number in done:
        found = parser.parse(f"did {number} of {total} items")
        assert (found is None) == (number > total)
        if found is not None:
            assert 0 <= found.percent <= 100
            assert found.left_s is None or found.left_s >= 0


def test_durations() -> None:
    assert [duration(value) for value in (0.04, 12, 200, 7500)] == ["0.0 s", "12 s", "3 min 20 s", "2 h 05 min"]
