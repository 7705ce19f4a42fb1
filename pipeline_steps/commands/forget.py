"""`sonify forget`: remove an image or audio clip, and list copies that cannot be removed from here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result
from pipeline_steps.core.errors import ConfigError


@handle_errors
def forget(
    context: typer.Context,
    what: Annotated[str, typer.Argument(metavar="ITEM", help="Id (or its beginning) of an image or audio clip, or its path.")],
    reason: Annotated[str, typer.Option(help="Why; is written into takedowns.csv.")] = "take-down",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove an item from pool, result cache and shards, and list what must be rebuilt and what cannot be removed."""
    from pipeline_steps.commands.deletion import execute_plan, plan_deletion
    from pipeline_steps.commands.doctor import check_unlocked
    from pipeline_steps.tracking.registry.item_trace import find_item, trace_item

    layout = layout_of(context)
    item = find_item(layout, what)
    if item is None:
        raise ConfigError(
            f"{what!r} is not an item of a catalog and not a file of the pool", "sonify trace, or dvc repro ingest"
        )
    if as_json and not (yes or dry_run):
        raise ConfigError("--json cannot ask for confirmation", "add --yes or --dry-run")
    plan = plan_deletion(layout, item, trace_item(layout, item))
    name = f"{'image' if item.kind == 'image' else 'audio clip'} {item.item_id}"
    if not dry_run:
        check_unlocked(layout)
        if not yes:
            print("\n".join(plan.lines()))
            typer.confirm(f"remove {name} for good?", abort=True)
        execute_plan(layout, item, plan, reason)
    lines = [f"{'would forget' if dry_run else 'forgot'} {name}", *plan.lines()]
    print_result({"item": item.item_id, "done": not dry_run, **asdict(plan)}, lines, as_json)
