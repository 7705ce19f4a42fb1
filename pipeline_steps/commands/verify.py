"""`sonify verify`: hash everything again. DVC does not: it trusts a cache object whose file mode says read-only."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.errors import IntegrityError

if TYPE_CHECKING:
    from pipeline_steps.commands.integrity import IntegrityCheck


@handle_errors
def verify(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Re-hash outs, DVC's cache, media shards, the search index and the weights; exit 6 names what differs."""
    from pipeline_steps.commands.integrity import check_all

    checks: list[IntegrityCheck] = check_all(layout_of(context))
    broken = [check for check in checks if check.problem]
    value = {
        "intact": not broken,
        "checked": sum(check.files for check in checks),
        "checks": [asdict(check) for check in checks],
    }
    if broken:
        first = broken[0]
        if as_json:
            print_result(value, [], as_json)
            raise typer.Exit(IntegrityError.exit_code)
        for check in broken[1:]:
            print_result(value, [f"{check.what}: {check.problem} -> {check.cure}"], as_json)
        raise IntegrityError(f"{first.what}: {first.problem}", first.cure)
    lines = table([check.what, f"{check.files} files", check.note or "intact"] for check in checks)
    print_result(value, [*lines, f"{value['checked']} files hashed; nothing differs"], as_json)
