"""`sonify quarantine`: items that were left out, with reasons."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.errors import ConfigError, suggest_name
from pipeline_steps.core.project_paths import ProjectPaths

app = typer.Typer(help="Items that a stage left out, with reason codes.", no_args_is_help=True)


OTHER_CODES = ("CAPTION_FAILED", "EMB_FAILED", "EMB_NONFINITE", "EMB_ZERO")
"""Codes of the stages after ingest."""


def rows_of(layout: ProjectPaths) -> list[dict[str, Any]]:
    """Every row of the quarantine tables of ingest, caption and embed.

    Raises:
        DataError: ingest has not run, or a table is broken.
    """
    from pipeline_steps.core.schemas import QUARANTINE
    from pipeline_steps.core.tables import read_table

    first, *later = (folder / "quarantine.parquet" for folder in (layout.catalog, layout.captions, layout.embeddings))
    tables = [read_table(path, QUARANTINE) for path in (first, *(path for path in later if path.is_file()))]
    return [row for each in tables for row in each.to_pylist()]


@app.command("list")
@handle_errors
def list_items(
    context: typer.Context,
    code: Annotated[str | None, typer.Option(help="Only this reason code, e.g. IMG_TRUNCATED.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the counts by reason code and the items."""
    from pipeline_steps.ingest.reason_codes import CODES

    every = rows_of(layout_of(context))
    known = {*CODES, *OTHER_CODES, *(row["code"] for row in every)}
    if code is not None and code not in known:
        raise ConfigError(f"there is no reason code {code!r}", suggest_name(code, sorted(known)))
    rows = [row for row in every if code is None or row["code"] == code]
    counts = Counter(row["code"] for row in rows)
    lines = [f"{len(rows)} items", *table([number, name] for name, number in counts.most_common())]
    if rows:
        lines += ["", *table([row["item_id"][:12], row["code"], row["kind"], row["path"], row["reason"]] for row in rows)]
    print_result({"count": len(rows), "codes": dict(counts.most_common()), "items": rows}, lines, as_json)


@app.command("show")
@handle_errors
def show(
    context: typer.Context,
    item: Annotated[str, typer.Argument(metavar="ID", help="Item id (or its beginning), or the path in the pool.")],
    as_json: JsonFlag = False,
) -> None:
    """Show all quarantine fields of one item."""
    rows = [
        row
        for row in rows_of(layout_of(context))
        if row["path"] == item or (row["item_id"] and row["item_id"].startswith(item))
    ]
    if not rows:
        raise ConfigError(f"nothing in quarantine has the id or path {item!r}", "sonify quarantine list")
    lines: list[str] = []
    for row in rows:
        lines += [*table([key, value] for key, value in row.items()), ""]
    print_result({"items": rows}, lines, as_json)
