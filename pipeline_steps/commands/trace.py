"""`sonify trace`: lineage of a model, or uses of an image or audio clip."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.errors import ConfigError, StageError
from pipeline_steps.core.project_paths import ProjectPaths

if TYPE_CHECKING:
    from pipeline_steps.tracking.lineage.lock_history import LockSnapshot, StageProvenance
    from pipeline_steps.tracking.registry.item_trace import ItemTrace
    from pipeline_steps.tracking.registry.model_registry import ModelRegistry, ModelVersionInfo


@handle_errors
def trace(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="[WHAT]", help="Model version, alias or run; or id or path of an image or audio clip.")
    ] = "",
    checkout: Annotated[
        Path | None,
        typer.Option("--checkout", metavar="DIR", help="Restore a model's code, data and weights in a new folder."),
    ] = None,
    everything: Annotated[bool, typer.Option("--list", help="List all model versions.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print the lineage of a model, or the pairs, splits and models that use an item."""
    from pipeline_steps.tracking.registry.item_trace import find_item, trace_item
    from pipeline_steps.tracking.registry.model_registry import ModelRegistry

    layout = layout_of(context)
    if everything:
        versions = ModelRegistry(layout).versions()
        rows = [[info.version, info.md5, ", ".join(info.aliases), info.commit[:12]] for info in versions]
        listed = [{name: getattr(info, name) for name in ("version", "md5", "aliases", "commit")} for info in versions]
        print_result({"versions": listed}, table([["version", "DVC md5", "aliases", "commit"], *rows]), as_json)
        return
    if not what:
        raise ConfigError("nothing to trace", "name a model version, an alias, a run, an image or a clip; or use --list")
    item = None if _is_version(what) or checkout else find_item(layout, what)
    if item:
        found = trace_item(layout, item)
        print_result(found.as_dict(), item_lines(found), as_json)
        return
    try:
        registry = ModelRegistry(layout)
        info = registry.resolve(what)
    except StageError as error:
        if _is_version(what) or checkout:
            raise
        raise ConfigError(
            f"{what!r} is no item of any catalog here; as a model: {error.reason}", "sonify trace --list"
        ) from error
    value, lines = model_trace(layout, registry, info, checkout)
    print_result(value, lines, as_json)


def model_trace(
    layout: ProjectPaths, registry: ModelRegistry, info: ModelVersionInfo, checkout: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """Lineage of a model version as JSON and as lines; with `checkout` also restores its files.

    Raises:
        DataError: no `dvc.lock` in this repository holds the model.
        IntegrityError: files brought back have other bytes.
    """
    from pipeline_steps.tracking.lineage.dvc_digests import relative
    from pipeline_steps.tracking.lineage.lock_history import checkout_snapshot, find_lock, stage_lineage

    info = replace(info, tags=registry.all_tags(info))
    path = info.tags.get("dvc.path") or relative(layout, layout.model)
    lock = find_lock(layout, path, info.md5, info.commit)
    steps = stage_lineage(lock.content, path)
    differing = disagreements(registry, info, steps)
    evaluations = [str(run.info.run_id) for run in registry.evaluations(info)]
    value: dict[str, Any] = {
        **{name: getattr(info, name) for name in ("version", "md5", "aliases", "run_id", "tags")},
        "trained_at_commit": info.commit,
        "lock_commit": lock.commit,
        "steps": [step.as_dict() for step in steps],
        "evaluations": evaluations,
        "differs_from_mlflow": differing,
    }
    lines = model_lines(info, lock, steps, evaluations, differing)
    if checkout is not None:
        found = checkout_snapshot(layout, lock, checkout)
        value["checkout"] = {"folder": str(checkout), "outs": found}
        lines.append(f"{len(found)} outs and raw inputs in {checkout}, every md5 as in dvc.lock")
    return value, lines


def disagreements(registry: ModelRegistry, info: ModelVersionInfo, steps: list[StageProvenance]) -> list[str]:
    """Data sets that the training run logged with another md5 than the lock has: it ran outside `dvc repro`."""
    from pipeline_steps.tracking.client.mlflow_client import run_datasets

    logged = run_datasets(registry.run(info.run_id))
    locked = {path: md5 for step in steps for path, md5 in {**step.reads, **step.writes}.items()}
    return [f"{name}: MLflow {md5}, dvc.lock {locked[name]}" for name, md5 in logged.items() if locked.get(name, md5) != md5]


def model_lines(
    info: ModelVersionInfo, lock: LockSnapshot, steps: list[StageProvenance], evaluations: list[str], differing: list[str]
) -> list[str]:
    """Lines of the lineage for the terminal, from raw data to evaluation."""
    rows = [["stage", "", "path", "DVC md5"]]
    for step in steps:
        rows += [[step.stage, "raw", path, step.reads[path]] for path in step.raw]
        rows += [[step.stage, "out", path, md5] for path, md5 in step.writes.items()]
    dirty = " and changes that were not committed" if info.tags.get("git.dirty") == "true" else ""
    lines = [
        f"version {info.version}  {info.md5}  {', '.join(info.aliases)}".rstrip(),
        f"trained at commit {info.commit[:12] or 'unknown'}{dirty}; digests of dvc.lock in {lock.where}",
        f"training run {info.run_id or 'unknown'}; evaluations {', '.join(evaluations) or 'none'}",
        *table(
            ["", name, info.tags[name]] for name in sorted(info.tags) if name.startswith(("pairs.", "families.", "params."))
        ),
        "",
        *table(rows),
    ]
    return [*lines, *(f"differs: {text}" for text in differing)]


def item_lines(found: ItemTrace) -> list[str]:
    """Lines of an item's trace for the terminal."""
    item = found.item
    lines = [
        f"{'image' if item.kind == 'image' else 'audio clip'} {item.item_id}, {item.state}"
        + (", held out for evaluation" if item.holdout else ""),
        *(f"  {source}" for source in item.sources),
    ]
    lines += [f"  license {item.license or 'unknown'}, author {item.author or 'unknown'}", ""]
    lines.append("pairs here:" if found.pairs else "in no pair here")
    lines += table([f"  {use.pair_id}", use.split, "with", " ".join(use.others)] for use in found.pairs)
    lines.append("")
    for use in found.versions:
        name = " ".join(["model version", use.version, *(f"({alias})" for alias in use.aliases)])
        if not use.pairs_available:
            lines.append(
                f"{name}: not known, its pairs {use.pairs_md5 or '(unrecorded)'} are not in DVC's cache; "
                "dvc fetch --all-commits"
            )
        elif use.occurrences:
            lines.append(f"{name}: {', '.join(f'{split} {count}' for split, count in use.splits.items())}")
        else:
            lines.append(f"{name}: in none of its pairs")
    if item.holdout:
        lines.append("held-out items are in no pair; every evaluation since they were added has used them")
    if found.versions_problem:
        lines.append(f"model versions are unknown: {found.versions_problem}")
    return lines


def _is_version(text: str) -> bool:
    return bool(re.fullmatch(r"\d{1,6}", text)) or text.startswith(("@", "models:/")) or text in {"champion", "challenger"}
