"""`sonify labels DIR`: export the labels of a data set as the table for `evaluate.ground_truth`.

Ingest never reads labels. Only stage evaluate reads the written table.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, print_result
from pipeline_steps.core.errors import ConfigError

COLUMNS = ("kind", "file", "label", "split", "pair")


@handle_errors
def labels(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with data sets in a known layout.")],
    out: Annotated[Path, typer.Option(help="CSV to write; outside DIR, or ingest's out would depend on it.")],
    gold: Annotated[str, typer.Option(help="Split whose rows are the gold pairs of the evaluation.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Write kind, file, label, split and pair of every item of DIR whose layout has labels."""
    from pipeline_steps.core.atomic import write_bytes
    from pipeline_steps.ingest.config import IngestConfig
    from pipeline_steps.ingest.sources.resolve import collect_ground_truth

    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder", "give the folder of ingest.root")
    if out.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{out} lies inside {folder}", "write the table outside that folder: ingest must not read labels")
    rows = collect_ground_truth(IngestConfig(metadata=None, pool=None, holdout=None), folder)
    if not rows:
        raise ConfigError(
            f"{folder} contains no data set of a known layout with labels", "see docs/reference/dataset-layouts.md"
        )
    table = [{**row, "split": "gold" if gold and row["split"] == gold else row["split"]} for row in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_bytes(out, buffer.getvalue().encode("utf-8"))
    pairs = {row["pair"] for row in table if row["pair"] and row["split"] == "gold"}
    value: dict[str, Any] = {"rows": len(table), "labels": len({row["label"] for row in table}), "gold_pairs": len(pairs)}
    lines = [f"{out}: {value['rows']} rows, {value['labels']} labels, {value['gold_pairs']} gold pairs"]
    print_result(value, [*lines, f"set evaluate.ground_truth: {out}"], as_json)
