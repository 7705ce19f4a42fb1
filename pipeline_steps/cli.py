"""Command line `sonify`. Each command is a module of `commands/`; heavy packages are imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline_steps.commands import (
    check,
    compare,
    doctor,
    draw,
    export,
    find,
    forget,
    labels,
    promote,
    quarantine,
    report,
    run,
    sync,
    trace,
    ui,
    verify,
)
from pipeline_steps.core.project_paths import ProjectPaths

app = typer.Typer(
    name="sonify",
    help="Build image-audio pairs, train an audio-to-image model on them, and evaluate both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("doctor")(doctor.doctor)
app.command("run")(run.run)
app.command("find")(find.find)
app.command("draw")(draw.draw)
app.command("report")(report.report)
app.add_typer(quarantine.app, name="quarantine")
app.command("check")(check.check)
app.command("labels")(labels.labels)
app.command("verify")(verify.verify)
app.command("export")(export.export)
app.command("trace")(trace.trace)
app.command("forget")(forget.forget)
app.command("compare")(compare.compare)
app.command("promote")(promote.promote)
app.command("rollback")(promote.rollback)
app.command("ui")(ui.ui)
app.command("sync")(sync.sync)


@app.callback()
def main(
    context: typer.Context,
    project: Annotated[
        Path | None,
        typer.Option("--project", "-C", help="Folder with dvc.yaml; default: this folder or the nearest above it."),
    ] = None,
) -> None:
    """Build image-audio pairs, train an audio-to-image model on them, and evaluate both."""
    context.obj = ProjectPaths(project if project is not None else _nearest(Path()))


def _nearest(start: Path) -> Path:
    """Nearest folder at or above `start` with a dvc.yaml; `start` itself if there is none."""
    here = start.resolve()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").is_file():
            return start if folder == here else folder
    return start
