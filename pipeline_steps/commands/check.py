"""`sonify check DIR`: dry run of ingest on any folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, ingest_config, layout_of, print_result, table
from pipeline_steps.core.errors import ConfigError, DataError


@handle_errors
def check(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with images and audio.")],
    metadata: Annotated[str | None, typer.Option(help="Table inside DIR (CSV, Parquet); default: walk DIR.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Decode every file of DIR like ingest and list what it accepts and quarantines. Exit code 3 if a run would stop."""
    from pipeline_steps.core.pool_check import find_unhashable
    from pipeline_steps.ingest.stage import dry_run as decode

    layout = layout_of(context)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder", "give a folder with images and audio")
    source: dict[str, Any] = {"pools": {}, "layout": "auto", "metadata": metadata, "pool": None, "holdout": None}
    config = ingest_config(layout).model_copy(update=source)
    found = decode(folder, config)
    report = found.report
    verdict = stops(len(found.images), len(found.audio), report.n_in, report.n_quarantined, config.max_failed_fraction)
    value: dict[str, Any] = {
        "folder": str(folder),
        **{name: getattr(report, name) for name in ("n_in", "n_ok", "n_abstained", "n_quarantined")},
        "images": len(found.images),
        "audio": len(found.audio),
        "layouts": report.metrics.get("layouts", {}),
        "normalizations": dict(Counter(code for row in [*found.images, *found.audio] for code in row["normalizations"])),
        "codes": dict(Counter(row["code"] for row in found.quarantine).most_common()),
        "quarantine": found.quarantine,
        "ingest_would_stop": verdict,
        "dvc_cannot_hash": [str(entry) for entry in find_unhashable(folder)],
    }
    lines = [
        f"{report.n_in} files: {report.n_ok} accepted, {report.n_abstained} abstained, {report.n_quarantined} quarantined",
        f"{len(found.images)} distinct images, {len(found.audio)} distinct audio clips",
        *(f"{place}: read as {layout}" for place, layout in report.metrics.get("layouts", {}).items()),
        *(f"repaired {code}: {count}" for code, count in value["normalizations"].items()),
        *table([row["code"], row["path"], row["reason"]] for row in found.quarantine),
        *(f"dvc repro would stop: {entry}" for entry in value["dvc_cannot_hash"]),
        f"ingest would stop: {verdict}" if verdict else "ingest would accept this folder",
    ]
    print_result(value, lines, as_json)
    raise typer.Exit(DataError.exit_code if verdict or value["dvc_cannot_hash"] else 0)


def stops(images: int, audio: int, n_in: int, n_quarantined: int, most: float) -> str:
    """Reason for which ingest would reject a folder with these counts; empty if it would accept it."""
    if not n_in:
        return "there are no images or audio files"
    if n_quarantined > most * n_in:
        return f"{n_quarantined} of {n_in} files are bad, more than ingest.max_failed_fraction {most}"
    empty = [name for name, count in (("images", images), ("audio files", audio)) if not count]
    return f"there are no usable {' and no usable '.join(empty)}" if empty else ""
