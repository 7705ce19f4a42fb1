"""`sonify report`: path and main metrics of the evaluation report."""

from __future__ import annotations

import json
import webbrowser
from typing import Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.errors import DataError


@handle_errors
def report(
    context: typer.Context,
    open_it: Annotated[bool, typer.Option("--open", help="Also open it in the browser.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print the path of the report and its main metrics."""
    layout = layout_of(context)
    page = layout.reports / "index.html"
    numbers = layout.reports / "evaluation.json"
    if not page.is_file() or not numbers.is_file():
        raise DataError(f"{page} does not exist yet", "sonify run")
    try:
        evaluation = json.loads(numbers.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{numbers} is not JSON: {error}", "dvc repro --force evaluate") from error
    lines = headline(evaluation)
    print_result({"report": str(page.resolve()), "evaluation": evaluation}, [*lines, f"report: {page.resolve()}"], as_json)
    if open_it:
        webbrowser.open(page.resolve().as_uri())


HEADLINE = ("win_rate_", "ais_win_rate_", "kid_")
"""Beginnings of the metrics of the model's row that are shown; the report has all of them."""


def headline(evaluation: dict[str, Any]) -> list[str]:
    """The model's agreement and distance on each set, and recall@10 of the retrieval rows: value, 95 % interval, N."""
    rows = []
    for name, block in evaluation.items():
        if not isinstance(block, dict) or not isinstance(block.get("rows"), dict):
            continue
        if name == "retrieval":
            rows += [
                estimate(f"{name}, {row}, recall_at_10", found.get("recall_at_10")) for row, found in block["rows"].items()
            ]
            continue
        found = block["rows"].get("model", {})
        rows += [estimate(f"{name}, {metric}", found[metric]) for metric in found if metric.startswith(HEADLINE)]
    return table(rows)


def estimate(name: str, entry: Any) -> list[str]:
    """Name, value, interval and N of one entry of evaluation.json."""
    if not isinstance(entry, dict) or not isinstance(entry.get("value"), (int, float)):
        return [name, "-", "", ""]
    low, high = entry.get("low"), entry.get("high")
    interval = f"[{low:.3f}, {high:.3f}]" if isinstance(low, (int, float)) and isinstance(high, (int, float)) else ""
    return [name, f"{entry['value']:.3f}", interval, f"n={entry['n']}" if "n" in entry else ""]
