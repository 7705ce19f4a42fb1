"""`sonify sync`: upload queued tracking entries to MLflow."""

from __future__ import annotations

import typer

from pipeline_steps.commands.console import JsonFlag, handle_errors, layout_of, print_result
from pipeline_steps.core.errors import ServiceError


@handle_errors
def sync(context: typer.Context, as_json: JsonFlag = False) -> None:
    """Upload tracking entries that were not uploaded when their stage ended; none is uploaded twice."""
    from pipeline_steps.tracking.client.offline_queue import all_queues
    from pipeline_steps.tracking.client.uploader import sync as carry
    from pipeline_steps.tracking.settings import read_settings, redact

    layout = layout_of(context)
    before = {queue.key: queue.unsent() for queue in all_queues(layout)}
    problems = carry(layout)
    left = {queue.key: queue.unsent() for queue in all_queues(layout) if queue.unsent()}
    sent = sum(before.values()) - sum(left.values())
    where = redact(read_settings(layout).uri)
    if left:
        first = next(iter(problems.values()), "new entries arrived")
        raise ServiceError(
            f"{sum(left.values())} tracking entries of {len(left)} runs are still in .runs/tracking ({first})",
            f"check that {where} is reachable, then run: sonify sync",
            transient=True,
            details={"sent": sent, "left": left, "problems": problems},
        )
    print_result({"sent": sent, "left": 0, "store": where}, [f"{sent} entries sent to {where}; none are left"], as_json)
