"""Text of the artifacts: plan, durations and reuse, metrics against the last run, failure. Pure functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from flows.dvc_graph import PlannedStage
from flows.log_progress import duration
from pipeline_steps.core.escape import escape_markdown
from pipeline_steps.core.presets import flatten

METRIC_ROWS = 60
TIMING_KEYS = ("seconds", "items_per_second", "n_in", "n_ok", "n_abstained", "n_quarantined", "computed", "reused")


def fenced(lines: Iterable[str]) -> str:
    """Lines as a code block they cannot close."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(escape_markdown(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def plan_rows(plan: Sequence[PlannedStage]) -> list[dict[str, Any]]:
    """The plan, one row a stage."""
    return [
        {"stage": escape_markdown(each.node.name), "runs": "yes" if each.runs else "", "why": escape_markdown(each.why)}
        for each in plan
    ]


def plan_text(plan: Sequence[PlannedStage]) -> str:
    """The plan as aligned lines."""
    width = max((len(each.node.name) for each in plan), default=0)
    return "\n".join(f"{'>' if each.runs else ' '} {each.node.name:<{width}}  {each.why}" for each in plan)


def stage_rows(
    plan: Sequence[PlannedStage], done: Mapping[str, tuple[str, float]], reports: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Durations and reuse, one row a stage; `done` holds (outcome, seconds) by stage, `reports` its own report."""
    rows = []
    for each in plan:
        name = each.node.name
        outcome, seconds = done.get(name, ("not run", 0.0))
        report = reports.get(name, {})
        ran = outcome == "ran"
        rows.append(
            {
                "stage": escape_markdown(name),
                "outcome": outcome,
                "time": duration(seconds) if seconds else "",
                "items": report.get("n_in", ""),
                "computed": report.get("computed", "") if ran else "",
                "reused": report.get("reused", "") if ran else "",
                "abstained": report.get("n_abstained", ""),
                "quarantined": report.get("n_quarantined", ""),
                "items/s": report.get("items_per_second", "") if ran else "",
            }
        )
    return rows


def numbers(text: str | None) -> dict[str, float]:
    """Finite numbers of a JSON metrics file by dotted key; empty when there is no such file or it is not an object."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    flat = dict(flatten(value)) if isinstance(value, dict) else {}
    return {
        key: float(number)
        for key, number in flat.items()
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    }


@dataclass(frozen=True, slots=True)
class MetricDelta:
    """One metric that differs: before, now (None: it is not there), and the interval it has now."""

    name: str
    old: float | None
    new: float | None
    interval: tuple[float, float] | None = None


def metrics_diff(old: Mapping[str, str | None], new: Mapping[str, str | None]) -> list[MetricDelta]:
    """Metrics that differ, by file; durations and balances stand in another table.

    A number reported as `{value, low, high, n, ...}` is one row: its value, with low and high as its interval.
    """
    rows = []
    for path in new:
        before, after = numbers(old.get(path)), numbers(new[path])
        for key in dict.fromkeys([*after, *before]):
            parent, _, last = key.rpartition(".")
            if last != "value" and (f"{parent}.value" in before or f"{parent}.value" in after):
                continue
            if key in TIMING_KEYS or key.endswith("seconds") or before.get(key) == after.get(key):
                continue
            bounds = after.get(f"{parent}.low"), after.get(f"{parent}.high")
            interval = (bounds[0], bounds[1]) if last == "value" and bounds[0] is not None and bounds[1] is not None else None
            name = f"{PurePosixPath(path).stem}: {parent if last == 'value' and parent else key}"
            rows.append(MetricDelta(name, before.get(key), after.get(key), interval))
    return rows


def metrics_text(rows: Sequence[MetricDelta], against: str) -> str:
    """The diff as Markdown."""
    if not rows:
        return f"No metric differs from {escape_markdown(against)}."
    shown = [
        (
            row.name,
            _number(row.old),
            _number(row.new),
            _number(None if row.old is None or row.new is None else row.new - row.old),
            f"{_number(row.interval[0])} to {_number(row.interval[1])}" if row.interval else "",
        )
        for row in rows[:METRIC_ROWS]
    ]
    more = f"\n\n{len(rows) - METRIC_ROWS} more differ." if len(rows) > METRIC_ROWS else ""
    return (
        f"Against {escape_markdown(against)}:\n\n" + table(("metric", "before", "now", "change", "interval now"), shown) + more
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
