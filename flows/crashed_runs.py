"""Marks flow runs whose process died as crashed. The next run in the workspace finds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter
from prefect.states import Crashed

from flows.stage_task import ignore_api_errors
from flows.workspace_lock import workspace_lock
from pipeline_steps.core.errors import LockedError

MESSAGE = "The process of this run died; the next run in its workspace detected it."


def mark_dead_run_crashed(record: Mapping[str, Any] | None, log: Callable[[str], None], own_id: str = "") -> None:
    """Mark the run of a record and its tasks as crashed.

    Args:
        record: record that `workspace_lock` yields; None: nothing to do.
        log: called with one line about the run.
        own_id: id of the calling run. A crashed run that is retried has the id of its record; then only the tasks of its
            earlier attempt are marked.
    """
    if record is None:
        return
    log(f"run {record.get('name', '?')} (PID {record.get('pid', '?')}) crashed in this workspace; finished stages are kept")
    try:
        run_id = UUID(str(record.get("flow_run_id", "")))
    except ValueError:
        return
    ignore_api_errors(mark_crashed, run_id, only_tasks=str(run_id) == own_id)


def mark_dead_runs_crashed(project: Path) -> None:
    """Mark a crashed run when the flows are served, unless another run is active."""
    with suppress(LockedError), workspace_lock(project, {"name": "serve", "flow_run_id": ""}, 0.0) as record:
        mark_dead_run_crashed(record, print)


def mark_crashed(run_id: UUID, *, only_tasks: bool) -> None:
    """Set the state of a run and its task runs to crashed, unless they have ended."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        if not only_tasks and run.state is not None and not run.state.is_final():
            client.set_flow_run_state(run_id, Crashed(message=MESSAGE), force=True)
        tasks = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])), task_run_filter=TaskRunFilter()
        )
        for task in tasks:
            if task.state is None or not task.state.is_final():
                client.set_task_run_state(task.id, Crashed(message=MESSAGE), force=True)
