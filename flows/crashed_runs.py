"""Runs whose process died: they must not stay Running. The next run that gets the workspace says what became of the last."""

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

MESSAGE = "The process of this run died; the next run in its workspace found it."


def mark_dead_run_crashed(left: Mapping[str, Any] | None, say: Callable[[str], None], own: str = "") -> None:
    """Mark the run in a record left behind, and its tasks, as crashed; `left` is what `lock.hold` yields.

    `own` is the id of the run that asks: when somebody starts a dead run again (*Retry*), the record names the one that is at
    work now, and only the tasks of its former attempt are dead.
    """
    if left is None:
        return
    say(f"run {left.get('name', '?')} (PID {left.get('pid', '?')}) died in this workspace; what it had finished is kept")
    try:
        run_id = UUID(str(left.get("flow_run_id", "")))
    except ValueError:
        return
    ignore_api_errors(lambda: mark_crashed(run_id, tasks_alone=str(run_id) == own))


def mark_dead_runs_crashed(project: Path) -> None:
    """The same when no run is at work: called when the flows are served again."""
    with suppress(LockedError), workspace_lock(project, {"name": "serve", "flow_run_id": ""}, 0.0) as left:
        mark_dead_run_crashed(left, print)


def mark_crashed(run_id: UUID, *, tasks_alone: bool) -> None:
    """Crashed, unless the run has ended; the same for its task runs."""
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        if not tasks_alone and run.state is not None and not run.state.is_final():
            client.set_flow_run_state(run_id, Crashed(message=MESSAGE), force=True)
        tasks = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])), task_run_filter=TaskRunFilter()
        )
        for task in tasks:
            if task.state is None or not task.state.is_final():
                client.set_task_run_state(task.id, Crashed(message=MESSAGE), force=True)
