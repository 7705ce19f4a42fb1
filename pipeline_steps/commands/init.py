"""`sonify init DIR`: a project folder for one's own images and clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, print_result
from pipeline_steps.core.errors import ConfigError


@handle_errors
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the project; it may exist.")],
    pictures: Annotated[Path | None, typer.Option(help="Folder with images.")] = None,
    sounds: Annotated[Path | None, typer.Option(help="Folder with audio clips; may be the same folder.")] = None,
    metadata: Annotated[
        Path | None, typer.Option(help="CSV or Parquet that names the files to use, their licenses, authors and groups.")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset to begin with: trial (minutes), embedded or full.")] = "trial",
    as_json: JsonFlag = False,
) -> None:
    """Make DIR a project that uses these files where they are. In a project: renew dvc.yaml after a change of params.yaml."""
    from pipeline_steps.core.project_paths import ProjectPaths
    from pipeline_steps.project.create import create_project, renew_project

    if pictures is None and sounds is None and metadata is None:
        layout = ProjectPaths(folder)
        done = renew_project(layout)
    elif pictures is None or sounds is None:
        raise ConfigError("--pictures and --sounds belong together", "give both; they may name the same folder")
    else:
        layout, done = create_project(folder, pictures, sounds, metadata, preset)
    following = f"next: cd {folder} && dvc repro"
    print_result({"project": str(layout.root), "done": done, "next": following}, [*done, following], as_json)
