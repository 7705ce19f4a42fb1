"""`sonify report`: path and main metrics of the evaluation report."""

from __future__ import annotations

import json
import webbrowser
from typing import Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.errors import DataError, StageError
from pipeline_steps.core.project_paths import ProjectPaths


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
    model, identity = model_identity(layout)
    value = {"report": str(page.resolve()), "model": model, "evaluation": evaluation}
    print_result(value, [*headline(evaluation), *identity, f"report: {page.resolve()}"], as_json)
    if open_it:
        webbrowser.open(page.resolve().as_uri())


SHOWN_PARAMETERS = ("recipe", "seed", "resolution", "audio.encoder", "sampling.num_inference_steps", "sampling.guidance_scale")
"""Keys of section `train` that are shown; with `--json` all are."""


def model_identity(layout: ProjectPaths) -> tuple[dict[str, Any] | None, list[str]]:
    """Version, digest, commit and parameters of the project's model, as JSON and as lines; None if there is no model."""
    from pipeline_steps.commands.model_facts import project_facts, version_of
    from pipeline_steps.core.presets import flatten

    if not layout.model.is_dir():
        return None, []
    try:
        facts = project_facts(layout)
    except StageError as error:
        return {"problem": str(error)}, [f"model: {error}"]
    version = version_of(layout, facts.md5)
    parameters = dict(flatten(facts.parameters))
    value = {"md5": facts.md5, "version": version, "commit": facts.commit, "pairs": facts.pairs_md5, "parameters": parameters}
    shown = ", ".join(f"{key} {parameters[key]}" for key in SHOWN_PARAMETERS if key in parameters)
    commit = facts.commit[:12] or "unknown"
    return value, [
        f"model: version {version or 'not registered'}, DVC md5 {facts.md5}, dvc.lock of commit {commit}",
        *([f"trained with: {shown}"] if shown else []),
        *([] if facts.metrics else ["the evaluation is not one of this model: dvc repro evaluate"]),
    ]


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
