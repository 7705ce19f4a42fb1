"""`sonify compare A B`: compare two model versions on the same test items."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.atomic import link_or_copy
from pipeline_steps.core.errors import DataError, ServiceError, StageError, load_error_file
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from pipeline_steps.tracking.registry.model_comparison import ModelComparison
    from pipeline_steps.tracking.registry.model_registry import ModelVersionInfo


@handle_errors
def compare(
    context: typer.Context,
    first: Annotated[str, typer.Argument(metavar="A", help="Version, alias or run of the baseline model.")] = "champion",
    second: Annotated[str, typer.Argument(metavar="B", help="Version, alias or run of the newer model.")] = "challenger",
    evaluate: Annotated[bool, typer.Option("--evaluate", help="First evaluate both on the data of this project.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the comparison as one HTML file.")] = None,
    log: Annotated[bool, typer.Option("--log/--no-log", help="Log it as artifact of B's evaluation run.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Compare two models: metrics with intervals and p-values, samples, differences in parameters and data."""
    from pipeline_steps.commands.compare_page import render
    from pipeline_steps.core.atomic import write_bytes
    from pipeline_steps.tracking.registry.model_comparison import compare_versions, log_comparison
    from pipeline_steps.tracking.registry.model_registry import ModelRegistry

    layout = layout_of(context)
    if evaluate:
        registry = ModelRegistry(layout)
        found = {info.md5: info for info in (registry.resolve(first), registry.resolve(second))}
        for info in found.values():
            evaluate_version(layout, info, registry.settings.uri)
    comparison = compare_versions(layout, first, second)
    page = render(comparison)
    value = comparison.as_dict()
    lines = summary(comparison)
    if html is not None:
        write_bytes(html, page.encode("utf-8"))
        lines.append(f"page: {html}")
    if log:
        try:
            log_comparison(layout, comparison, {"compare.html": page, "compare.json": json.dumps(value, indent=2)})
        except ServiceError as error:
            lines.append(f"not logged to MLflow: {error}")
    print_result({**value, "html": str(html) if html else None}, lines, as_json)


def summary(comparison: ModelComparison) -> list[str]:
    """Lines of the comparison for the terminal."""
    a, b = comparison.a, comparison.b
    rows = [["metric", "A", "B", "B - A", "95 % interval", "p", "items +/-", "verdict"]]
    for found in comparison.metrics:
        gap = found.difference
        interval = "-" if gap.low is None or gap.high is None else f"{gap.low:+.4f} to {gap.high:+.4f}"
        p = "-" if gap.p is None else f"{gap.p:.3f}"
        items = "-" if found.wins is None else f"{found.wins}/{found.losses}"
        rows.append([found.metric, f"{found.a:.4f}", f"{found.b:.4f}", f"{gap.value:+.4f}", interval, p, items, found.verdict])
    lines = [
        f"{letter}: version {info.version}  {info.md5}  {', '.join(info.aliases)}" for letter, info in (("A", a), ("B", b))
    ]
    lines += ["", *table(rows), ""]
    for title, changes in (("parameters", comparison.parameters), ("provenance", comparison.provenance)):
        lines += [f"{title}:", *table([f"  {c.name}", c.a or "-", c.b or "-"] for c in changes)] if changes else []
    return [*lines, *(f"note: {note}" for note in comparison.notes)]


DATA = ("assets", "captions", "catalog", "embeddings", "media", "pairs", "retrieval")


def evaluate_version(layout: ProjectPaths, info: ModelVersionInfo, uri: str) -> None:
    """Run stage evaluate on a model version with the data and parameters of this project, with tracking.

    It runs in a temporary project of hard links below `.runs/`, so reports and models of this project do not change.

    Raises:
        StageError: raised by the stage.
        DataError, IntegrityError: the model cannot be read, or a stage has not run here yet.
    """
    from pipeline_steps.core.config import load_params
    from pipeline_steps.tracking.registry.model_comparison import fetch_model

    root = layout.runs / "evaluate" / info.md5[:12]
    shutil.rmtree(root, ignore_errors=True)
    scratch = ProjectPaths(root)
    params = load_params(layout.params)
    try:
        for name in DATA:
            source: Path = getattr(layout, name)
            if not source.is_dir():
                raise DataError(f"{source} is missing", "run: dvc repro pair")
            shutil.copytree(source, getattr(scratch, name), copy_function=link_or_copy)
        gold = params["evaluate"].get("ground_truth")
        if gold and not Path(gold).is_absolute():
            (root / gold).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(layout.root / gold, root / gold)
        shutil.copy(layout.params, scratch.params)
        scratch.model.parent.mkdir(parents=True)
        shutil.copytree(fetch_model(layout, info, root / "fetched"), scratch.model, copy_function=link_or_copy)
        layout.result_cache.mkdir(parents=True, exist_ok=True)
        scratch.result_cache.parent.mkdir(parents=True)
        scratch.result_cache.symlink_to(layout.result_cache.resolve(), target_is_directory=True)
        environment = {name: value for name, value in os.environ.items() if name not in {"DVC_STAGE", "DVC_ROOT"}}
        package = str(Path(__file__).resolve().parents[2])
        environment |= {"MLFLOW_TRACKING_URI": uri, "SONIFY_TRACKING": "strict"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        environment.setdefault("SONIFY_TRACKING_DEADLINE", "120")
        command = [sys.executable, "-m", "pipeline_steps", "evaluate"]
        done = subprocess.run(command, cwd=root, env=environment, stdout=sys.stderr, check=False)
        if done.returncode:
            raise _failure(root, info, done.returncode)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _failure(root: Path, info: ModelVersionInfo, code: int) -> StageError:
    error = load_error_file(root) or StageError(f"exit code {code}")
    error.reason = f"version {info.version} could not be evaluated: {error.reason}"
    return error
