"""Command line `sonify`. Each command is a module of `commands/`; heavy packages are imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline_steps import __version__
from pipeline_steps.commands import (
    check,
    compare,
    demo,
    doctor,
    draw,
    export,
    find,
    forget,
    init,
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
from pipeline_steps.core.project_paths import ProjectPaths, find_root

app = typer.Typer(
    name="sonify",
    help="Build image-audio pairs, train an audio-to-image model on them, and evaluate both.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command(cls=draw.DrawCommand)(draw.draw)
app.add_typer(quarantine.app, name="quarantine")
for command in (
    *(init.init, doctor.doctor, run.run, find.find, report.report, check.check, labels.labels, verify.verify, export.export),
    *(trace.trace, forget.forget, compare.compare, promote.promote, promote.rollback, ui.ui, demo.demo, sync.sync),
):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sonify {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    project: Annotated[
        Path | None,
        typer.Option("--project", "-C", help="Folder with dvc.yaml; default: this folder or the nearest above it."),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Build image-audio pairs, train an audio-to-image model on them, and evaluate both."""
    nearest = find_root(Path())
    context.obj = ProjectPaths(project or (nearest if nearest and nearest != Path.cwd() else Path()))
