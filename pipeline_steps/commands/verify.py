"""`sonify verify`: hash all files again. DVC does not: it trusts a cache object whose file mode is read-only."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result, table
from pipeline_steps.core.errors import DataError, IntegrityError

if TYPE_CHECKING:
    from pipeline_steps.commands.integrity import IntegrityCheck


@handle_errors
def verify(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Hash outs, DVC's cache, media shards, search index, embeddings and weights again; exit code 6 if any differs."""
    from pipeline_steps.commands.integrity import check_all

    checks: list[IntegrityCheck] = check_all(layout_of(context))
    if not checks:
        raise DataError("nothing to verify: dvc.lock records no outs, and there are no shards, index or weights", "sonify run")
    broken = [check for check in checks if check.problem]
    checked = sum(check.files for check in checks)
    value = {"intact": not broken, "checked": checked, "checks": [asdict(check) for check in checks]}
    if broken and not as_json:
        first, *others = broken
        print_result(value, [f"{check.what}: {check.problem} -> {check.fix}" for check in others], as_json)
        raise IntegrityError(f"{first.what}: {first.problem}", first.fix)
    lines = table([check.what, f"{check.files} files", check.note or "intact"] for check in checks)
    print_result(value, [*lines, f"{checked} files hashed; no differences"], as_json)
    raise typer.Exit(IntegrityError.exit_code if broken else 0)
