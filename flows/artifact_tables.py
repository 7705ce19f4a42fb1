"""Text and tables of artifacts: plan, durations and cache hits, compared metrics. Pure functions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from flows.dvc_graph import PlannedStage
from flows.dvc_subprocess import RAN, StageOutcome
from flows.log_progress import duration
from pipeline_steps.core.escape import escape_markdown
from pipeline_steps.core.presets import flatten

METRIC_ROWS = 60
ITEM_COUNTS = ("n_in", "n_ok", "n_abstained", "n_quarantined")


def fenced(lines: Iterable[str]) -> str:
    """Lines as a Markdown code block whose fence does not occur in them."""
    text = "\n".join(lines)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown table with escaped cells."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(escape_markdown(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def plan_rows(plan: Sequence[PlannedStage]) -> list[dict[str, Any]]:
    """Rows of the plan, one per stage."""
    return [
        {"stage": escape_markdown(each.node.name), "runs": "yes" if each.runs else "", "why": escape_markdown(each.why)}
        for each in plan
    ]


def plan_text(plan: Sequence[PlannedStage]) -> str:
    """Plan as aligned lines."""
    width = max((len(each.node.name) for each in plan), default=0)
    return "\n".join(f"{'>' if each.runs else ' '} {each.node.name:<{width}}  {each.why}" for each in plan)


def stage_rows(
    plan: Sequence[PlannedStage], done: Mapping[str, StageOutcome], reports: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Durations, item counts and cache hits, one row per stage; `done` and `reports` are keyed by stage."""
    rows = []
    for each in plan:
        name = each.node.name
        stage = done.get(name, StageOutcome(name, "not run", 0.0))
        report = reports.get(name, {})
        ran = stage.outcome == RAN
        rows.append(
            {
                "stage": escape_markdown(name),
                "outcome": stage.outcome,
                "time": duration(stage.seconds) if stage.seconds else "",
                "items": report.get("n_in", ""),
                "cache_misses": report.get("cache_misses", "") if ran else "",
                "cache_hits": report.get("cache_hits", "") if ran else "",
                "abstained": report.get("n_abstained", ""),
                "quarantined": report.get("n_quarantined", ""),
                "items/s": report.get("items_per_second", "") if ran else "",
            }
        )
    return rows


def numbers(text: str | None) -> dict[str, float]:
    """Finite numbers of a JSON metrics file by dotted key; empty if the text is None or not a JSON object."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return {
        key: float(number)
        for key, number in flatten(value if isinstance(value, dict) else {})
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    }


@dataclass(frozen=True, slots=True)
class MetricDelta:
    """Metric that differs: old and new value (None: missing) and interval of the new value."""

    name: str
    old: float | None
    new: float | None
    interval: tuple[float, float] | None = None


def metrics_diff(old: Mapping[str, str | None], new: Mapping[str, str | None]) -> list[MetricDelta]:
    """Metrics that differ, by file; durations and item counts are left out.

    A metric `{value, low, high, n, ...}` is one row: its value with the interval from low to high. So is a metric NAME beside
    NAME_low and NAME_high.
    """
    rows = []
    for path in new:
        before, after = numbers(old.get(path)), numbers(new[path])
        for key in dict.fromkeys([*after, *before]):
            parent, _, last = key.rpartition(".")
            metric = re.sub("_(low|high)$", "", key)
            if metric != key and (metric in before or metric in after):
                continue
            if last != "value" and (f"{parent}.value" in before or f"{parent}.value" in after):
                continue
            if key in ITEM_COUNTS or key.endswith("seconds") or before.get(key) == after.get(key):
                continue
            low, high = (after.get(f"{parent}.{end}" if last == "value" else f"{key}_{end}") for end in ("low", "high"))
            interval = (low, high) if low is not None and high is not None else None
            name = f"{PurePosixPath(path).stem}: {parent if last == 'value' and parent else key}"
            rows.append(MetricDelta(name, before.get(key), after.get(key), interval))
    return rows


def metrics_text(rows: Sequence[MetricDelta], against: str) -> str:
    """Differing metrics as Markdown."""
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
