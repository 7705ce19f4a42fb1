"""Artifacts are inert, whatever a file name or an error says; metrics are compared number by number."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from flows.artifact_tables import MetricDelta, fenced, metrics_diff, metrics_text, table
from pipeline_steps.core.escape import escape_markdown


@given(st.text(max_size=80))
def test_a_cell_is_one_inert_cell(text: str) -> None:
    shown = escape_markdown(text)
    assert "\n" not in shown
    assert "<" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[\]!*_]", shown)
    assert len(table(("a",), [(text,)]).splitlines()) == 3


@given(st.lists(st.text(alphabet="`ab~ \n", max_size=20), max_size=6))
def test_code_blocks_cannot_be_closed_by_their_lines(lines: list[str]) -> None:
    block = fenced(lines)
    fence = block[: len(block) - len(block.lstrip("`"))]
    inside = block.removeprefix(fence).removesuffix(fence)
    assert len(fence) >= 3
    assert fence not in inside


def test_differing_metrics() -> None:
    old = {"r/a.json": '{"loss": 0.5, "kid": {"value": 1.0, "n": 10, "low": 0.5}, "seconds": 3, "gone": 1}', "r/b.json": None}
    new = {
        "r/a.json": '{"loss": 0.25, "kid": {"value": 2.0, "n": 12, "low": 1.5, "high": 2.5}, "seconds": 9, "nan": "NaN"}',
        "r/b.json": '{"x": 2, "ok": true}',
    }
    rows = metrics_diff(old, new)
    assert rows == [
        MetricDelta("a: loss", 0.5, 0.25),
        MetricDelta("a: kid", 1.0, 2.0, (1.5, 2.5)),
        MetricDelta("a: gone", 1.0, None),
        MetricDelta("b: x", None, 2.0),
    ]
    flat = {"r/metrics.json": '{"test": {"win_rate": 0.6, "win_rate_low": 0.5, "win_rate_high": 0.7, "clips": 9}}'}
    assert metrics_diff({}, flat) == [
        MetricDelta("metrics: test.win_rate", None, 0.6, (0.5, 0.7)),
        MetricDelta("metrics: test.clips", None, 9.0),
    ]
    text = metrics_text(rows, "runs/before")
    assert "| a: loss | 0.5 | 0.25 | -0.25 |  |" in text
    assert "| a: kid | 1 | 2 | 1 | 1.5 to 2.5 |" in text
    assert metrics_text([], "runs/x|y") == r"No metric differs from runs/x\|y."
    many = [MetricDelta(f"m{number}", 0.0, 1.0) for number in range(100)]
    assert "40 more differ" in metrics_text(many, "x")
