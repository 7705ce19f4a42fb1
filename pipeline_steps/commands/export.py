"""`sonify export`: write a publishable data set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result


@handle_errors
def export(
    context: typer.Context,
    webdataset: Annotated[Path, typer.Option("--webdataset", metavar="DIR", help="New folder for the WebDataset shards.")],
    license: Annotated[list[str] | None, typer.Option(help="Only items under this SPDX id; may be repeated.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write the pairs that may be published as WebDataset shards, with index, licenses, card and Croissant file."""
    from pipeline_steps.pair.release.export import export_webdataset

    release = export_webdataset(layout_of(context), webdataset, licenses=license or None)
    lines = [f"{sum(release.pairs.values())} pairs in {len(release.shards)} shards: {webdataset}"]
    lines += [f"left out, {code}: {count}" for code, count in release.left_out.items() if count]
    lines += [f"no license text for {name}" for name in release.licenses_without_text]
    print_result(asdict(release), lines, as_json)
