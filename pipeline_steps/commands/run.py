"""`sonify run`: `dvc repro`, with presets and the stage's own exit code."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline_steps.commands.console import handle_errors, layout_of, print_result
from pipeline_steps.core.errors import (
    ERROR_FILE,
    ConfigError,
    IntegrityError,
    LockedError,
    ServiceError,
    StageError,
    load_error_file,
    suggest_name,
)
from pipeline_steps.core.escape import escape_terminal
from pipeline_steps.core.hashing import sha256_file
from pipeline_steps.core.project_paths import ProjectPaths

STDERR = 2


def apply_preset(layout: ProjectPaths, name: str) -> list[str]:
    """Set the values of `presets/NAME.yaml` in `params.yaml`; returns the diff. The old file is kept below `.runs/params/`.

    Raises:
        ConfigError: the preset or `params.yaml` does not exist, or the result is not valid.
    """
    from pipeline_steps.core.atomic import write_bytes, write_text
    from pipeline_steps.core.config import load_params
    from pipeline_steps.core.presets import load_overlay, merge, render_params, validate_params

    overlay = load_overlay(layout.root, name)
    params = load_params(layout.params)
    old = layout.params.read_text(encoding="utf-8")
    new = render_params(old, overlay)
    merge(params, overlay)
    validate_params(params, f"correct presets/{name}.yaml or params.yaml")
    labels = ("params.yaml", f"params.yaml with presets/{name}.yaml")
    changes = list(difflib.unified_diff(old.splitlines(), new.splitlines(), *labels, lineterm="", n=2))
    if changes:
        write_bytes(layout.runs / "params" / f"{sha256_file(layout.params)[:12]}.yaml", layout.params.read_bytes())
        write_text(layout.params, new)
    return changes


def reproduce(layout: ProjectPaths, stages: list[str], force: bool, quiet: bool) -> None:
    """Run `dvc repro` with its output on the terminal.

    Raises:
        StageError: the stage's own reason and exit code, from its `error.json`; LockedError when another DVC is at work.
    """
    (layout.root / ERROR_FILE).unlink(missing_ok=True)
    command = [sys.executable, "-m", "dvc", "repro", *(["--force"] if force else []), *stages]
    # The commands of dvc.yaml begin with `python`: it must be this one, also when no environment is activated.
    path = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    try:
        done = subprocess.run(
            command, cwd=layout.root, env={**os.environ, "PATH": path}, stdout=STDERR if quiet else None, check=False
        )
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if done.returncode:
        raise _failure(layout, done.returncode)


def _failure(layout: ProjectPaths, dvc_code: int) -> StageError:
    """Error that stopped `dvc repro`, which exits with 255 for every failure."""
    error = load_error_file(layout.root)
    if error is not None:
        error.reason = f"{error.stage}: {error.reason}"
        return error
    from pipeline_steps.commands.doctor import check_unlocked

    try:
        check_unlocked(layout)
    except LockedError as locked:
        return locked
    return ConfigError(f"dvc repro ended with {dvc_code} before a stage could report", "see DVC's message above; sonify doctor")


def check_params(layout: ProjectPaths) -> None:
    """Check every section of `params.yaml`, also of stages that run much later.

    Raises:
        ConfigError: all problems in one message.
    """
    from pipeline_steps.__main__ import STAGES
    from pipeline_steps.core.config import load_params
    from pipeline_steps.core.presets import validate_params

    if not layout.params.is_file():
        return
    params = load_params(layout.params)
    missing = [stage for stage in STAGES if stage not in params]
    for name in params:
        if name not in STAGES and difflib.get_close_matches(str(name), missing, n=1):
            raise ConfigError(f"params.yaml: section {name} belongs to no stage", suggest_name(str(name), missing))
    validate_params(params, "correct params.yaml")


def check_checkpoints(layout: ProjectPaths, stages: list[str]) -> None:
    """Check the checkpoints and servers of the stages to run; print a line on stderr for each fault.

    One that cannot be reached now stops nothing: the stage may need no more than its cache.

    Raises:
        ConfigError, IntegrityError: a fault that a later attempt does not remove.
    """
    from pipeline_steps.__main__ import STAGES
    from pipeline_steps.commands.preflight import run_preflight

    if not layout.params.is_file():
        return
    last = max((STAGES.index(stage) for stage in stages), default=len(STAGES) - 1)
    faults = [result for result in run_preflight(layout, STAGES[: last + 1]) if result.status == "fail"]
    for result in faults:
        print(escape_terminal(f"{result.name}: {result.found} -> {result.fix}"), file=sys.stderr, flush=True)
    lasting = [result for result in faults if result.exit_code != ServiceError.exit_code]
    if lasting:
        kind = IntegrityError if lasting[0].exit_code == IntegrityError.exit_code else ConfigError
        names = ", ".join(result.name for result in lasting)
        raise kind(f"{names}: not usable, see above; no stage was run", lasting[0].fix)


def summary(layout: ProjectPaths) -> dict[str, Any]:
    """Item counts of every stage with a report."""
    from pipeline_steps.__main__ import STAGES

    found: dict[str, Any] = {}
    for stage in STAGES:
        path = layout.report(stage)
        if path.is_file():
            report = json.loads(path.read_text(encoding="utf-8"))
            runtime = layout.runtime(stage)
            report |= json.loads(runtime.read_text(encoding="utf-8")) if runtime.is_file() else {}
            keys = ("n_in", "n_ok", "n_abstained", "n_quarantined", "cache_misses", "cache_hits", "seconds")
            found[stage] = {key: report.get(key) for key in keys}
    return found


@handle_errors
def run(
    context: typer.Context,
    stages: Annotated[
        list[str] | None, typer.Argument(help="Stages to bring up to date, with all before them; default: all.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Set the values of presets/NAME.yaml in params.yaml first; prints the diff.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run the stages even when nothing has changed.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end; DVC's output goes to stderr.")
    ] = False,
) -> None:
    """Run the pipeline (dvc repro); only stale stages run."""
    from pipeline_steps.__main__ import STAGES
    from pipeline_steps.core.pool_check import check_project_pools

    layout = layout_of(context)
    for stage in stages or []:
        if stage not in STAGES:
            raise ConfigError(f"there is no stage {stage!r}", suggest_name(stage, STAGES, f"stages: {', '.join(STAGES)}"))
    if not (layout.root / "dvc.yaml").is_file():
        raise ConfigError(f"{layout.root.resolve()} contains no dvc.yaml", "go to the project folder, or use --project")
    changes = apply_preset(layout, preset) if preset else []
    if preset and not as_json:
        print("\n".join(changes) if changes else f"params.yaml already has the values of preset {preset}", flush=True)
    if set(stages or []) != {"assets"}:
        check_project_pools(layout)
    check_params(layout)
    check_checkpoints(layout, stages or [])
    reproduce(layout, stages or [], force, quiet=as_json)
    done = summary(layout)
    page = layout.reports / "index.html"
    found = str(page) if page.is_file() else None
    print_result({"params_diff": changes, "stages": done, "report": found}, [f"report: {found}"] if found else [], as_json)
