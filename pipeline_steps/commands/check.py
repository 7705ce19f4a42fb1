"""`sonify check [DIR]`: dry run of ingest on the project's own pools or on any folder, and a prediction of a run."""

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
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Folder with images and audio; default: the project's own pools.")
    ] = None,
    metadata: Annotated[str | None, typer.Option(help="Table inside DIR (CSV, Parquet); default: walk DIR.")] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Without DIR: images and clips on which the stages up to pair are tried; 0: none.")
    ] = 300,
    as_json: JsonFlag = False,
) -> None:
    """Decode every file like ingest and list what it accepts and quarantines.

    Without DIR the project's parameters are used, the stages up to pair are tried on a sample, and pairs, time and disk of a
    run are estimated. Exit code 3 if a run would stop or end without metrics.
    """
    from pipeline_steps.core.pool_check import check_pool_deps, find_unhashable
    from pipeline_steps.ingest.sources.resolve import list_sources
    from pipeline_steps.ingest.stage import dry_run as decode

    layout = layout_of(context)
    config = ingest_config(layout)
    if folder is None:
        if metadata is not None:
            raise ConfigError("--metadata needs DIR", "without DIR the tables are those of the parameters")
        check_pool_deps(layout)
        roots = [source.root for source in list_sources(config, layout.root)]
        found = decode(layout.root if config.pools else roots[0], config)
    else:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder", "give a folder with images and audio")
        roots = [folder]
        source: dict[str, Any] = {"pools": {}, "layout": "auto", "metadata": metadata, "pool": None, "holdout": None}
        config = config.model_copy(update=source)
        found = decode(folder, config)
    report = found.report
    error = found.error
    verdict = "" if error is None else error.reason if folder else str(error)  # the keys are those of the project's pools
    value: dict[str, Any] = {
        "folder": str(folder or layout.root),
        **{name: getattr(report, name) for name in ("n_in", "n_ok", "n_abstained", "n_quarantined")},
        "images": len(found.images),
        "audio": len(found.audio),
        "layouts": report.metrics.get("layouts", {}),
        "normalizations": dict(Counter(code for row in [*found.images, *found.audio] for code in row["normalizations"])),
        "codes": dict(Counter(row["code"] for row in found.quarantine).most_common()),
        "quarantine": found.quarantine,
        "ingest_would_stop": verdict,
        "dvc_cannot_hash": [str(entry) for root in roots for entry in find_unhashable(root)],
    }
    lines = [
        f"{report.n_in} files: {report.n_ok} accepted, {report.n_abstained} abstained, {report.n_quarantined} quarantined",
        f"{len(found.images)} distinct images, {len(found.audio)} distinct audio clips",
        *(f"{place}: read as {layout}" for place, layout in report.metrics.get("layouts", {}).items()),
        *(f"repaired {code}: {count}" for code, count in value["normalizations"].items()),
        *table([row["code"], row["path"], row["reason"]] for row in found.quarantine),
        *(f"dvc repro would stop: {entry}" for entry in value["dvc_cannot_hash"]),
        f"ingest would stop: {verdict}" if verdict else f"ingest would accept {'this folder' if folder else 'the pools'}",
    ]
    problems: list[str] = []
    if folder is None and sample and not verdict and not value["dvc_cannot_hash"]:
        from pipeline_steps.commands.pool_trial import prediction, try_pool
        from pipeline_steps.core.config import load_params

        trial = try_pool(layout, config, sample)
        predicted, problems = prediction(trial, layout, load_params(layout.params))
        lines += [*predicted, *problems]
        value["trial"] = {
            name: getattr(trial, name)
            for name in ("sampled_images", "sampled_audio", "splits", "abstained", "seconds", "peak_memory_bytes")
        } | {"expected_pairs": trial.expected_pairs(), "problems": problems}
    print_result(value, lines, as_json)
    raise typer.Exit(DataError.exit_code if verdict or value["dvc_cannot_hash"] or problems else 0)
