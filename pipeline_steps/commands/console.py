"""Shared parts of the commands: `--json`, one-line errors with exit codes, escaped terminal output."""

from __future__ import annotations

import errno
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from pipeline_steps.core.errors import ConfigError, ResourceError, StageError
from pipeline_steps.core.escape import escape_terminal
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from pipeline_steps.ingest.config import IngestConfig

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the table. `status` is ok, warn or fail; a failed check decides the exit code."""

    name: str
    status: str
    found: str
    wanted: str = ""
    fix: str = ""
    exit_code: int = 0


def handle_errors(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: print a StageError as one line and exit with its code; with `--json` also print `{"error": ...}`."""

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except StageError as error:
            failure = error
        except MemoryError:
            failure = ResourceError("out of memory", "close other programs or choose smaller parameters")
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EACCES, errno.EROFS}:
                raise
            failure = ResourceError(f"{error.strerror}: {error.filename}", "free disk space or choose another folder")
        if kwargs.get("as_json"):
            print(json.dumps({"error": failure.as_dict()}, default=str))
        print(f"sonify: {escape_terminal(str(failure))}", file=sys.stderr)
        raise typer.Exit(failure.exit_code)

    return wrapper


def print_result(value: dict[str, Any], lines: Iterable[str], as_json: bool) -> None:
    """Print the object as JSON, or the lines."""
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
        return
    for line in lines:
        print(escape_terminal(line))


def table(rows: Iterable[Iterable[Any]]) -> list[str]:
    """Rows as lines with aligned columns."""
    cells = [[escape_terminal(str(cell)).replace("\n", "\\n").replace("\t", "\\t") for cell in row] for row in rows]
    if not cells:
        return []
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def progress_bar(items: Sequence[Item], description: str) -> Iterable[Item]:
    """Iterate with a progress bar on stderr if it is a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description, console=Console(stderr=True), transient=True)


def ingest_config(layout: ProjectPaths) -> IngestConfig:
    """Section `ingest` of the project's parameters; its defaults where there is no such section."""
    from pipeline_steps.core.config import load_params, parse_section
    from pipeline_steps.ingest.config import IngestConfig

    params = load_params(layout.params) if layout.params.is_file() else {}
    return parse_section(IngestConfig, "ingest", params) if "ingest" in params else IngestConfig()


def layout_of(context: typer.Context) -> ProjectPaths:
    """Paths of the project that the command works on."""
    layout = context.obj
    if not isinstance(layout, ProjectPaths):
        raise ConfigError("no project folder", "call sonify inside a project, or with --project")
    return layout
