"""Prefect task of a stage: runs it with DVC and shows its log, progress and failure."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec
from uuid import UUID

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.runtime import flow_run
from prefect.tasks import Task, exponential_backoff

from flows.artifact_tables import fenced
from flows.dvc_graph import PlannedStage
from flows.dvc_subprocess import UNCHANGED, StageFailedError, StageOutcome, run_dvc_stage
from flows.git_worktree import RunWorkspace
from flows.log_progress import ProgressParser
from flows.workspace_lock import recover_dvc_lock, update_lock_record
from pipeline_steps.core.escape import escape_markdown
from pipeline_steps.tracking.settings import redact

Parameters = ParamSpec("Parameters")

PROGRESS_EVERY_S = 3.0
SLOW_S = 10.0
PAUSE_S = 120.0
"""Pause of progress updates after one that took longer than SLOW_S, because it blocks the log and the time limit."""
RETRY_DELAY_S = 10


def artifact_key(*parts: str) -> str:
    """Artifact key of lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def ignore_api_errors(show: Callable[Parameters, Any], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Any:
    """Call `show` and ignore errors of Prefect's API while it creates artifacts; a warning is logged instead."""
    try:
        return show(*args, **kwargs)
    except Exception as error:
        with suppress(Exception):
            get_run_logger().warning("artifact not created: %s", " ".join(str(error).split())[:300])
        return None


def stage_task(planned: PlannedStage) -> Task[[PlannedStage, RunWorkspace, bool], StageOutcome]:
    """Task of a stage, with the name, tags and retries of its node."""
    node = planned.node
    return run_stage.with_options(
        name=node.name,
        task_run_name=node.name,
        description=node.desc or node.cmd,
        tags=[str(tag) for tag in node.meta.get("tags", ())],
        retries=int(node.meta.get("retries", 0)),
        retry_delay_seconds=exponential_backoff(int(node.meta.get("retry_delay_s", RETRY_DELAY_S))),
        retry_condition_fn=is_transient,
    )


def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether the failure is transient according to the stage's `error.json`, so that a retry may succeed."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageFailedError) and error.transient


@task(cache_policy=NO_CACHE, persist_result=False)
def run_stage(planned: PlannedStage, workspace: RunWorkspace, force: bool) -> StageOutcome:
    """Bring one stage up to date.

    Raises:
        StageFailedError: the stage failed.
    """
    log = get_run_logger()
    node = planned.node
    if not planned.runs:
        log.info("nothing to do")
        return StageOutcome(node.name, UNCHANGED, 0.0)
    log.info("%s", planned.why)
    for line in recover_dvc_lock(workspace.root):
        log.warning(line)
    progress = _ProgressArtifact(node.name)

    def on_line(line: str) -> None:
        line = redact(line)
        log.info("%s", line)
        progress.update(line)

    try:
        outcome = run_dvc_stage(
            node.name,
            workspace.root,
            force=force,
            timeout_s=float(node.meta["timeout_s"]) if "timeout_s" in node.meta else None,
            environment={
                **workspace.environment(),
                "SONIFY_FLOW_RUN_ID": str(flow_run.get_id() or ""),
                "SONIFY_RUN_NAME": str(flow_run.get_name() or ""),
            },
            on_line=on_line,
            on_start=lambda group: update_lock_record(workspace.project, group=group, folder=str(workspace.root)),
        )
    except StageFailedError as error:
        _show_failure(error)
        raise
    progress.finish(outcome)
    log.info("%s: %s", node.name, outcome.outcome)
    return outcome


class _ProgressArtifact:
    """Progress artifact of a stage, updated from its log lines at most every PROGRESS_EVERY_S seconds."""

    def __init__(self, stage: str) -> None:
        self._parser = ProgressParser()
        self._stage = stage
        self._updated = 0.0
        key, text = artifact_key("progress", stage), f"{escape_markdown(stage)}: started"
        self._id: UUID | None = ignore_api_errors(create_progress_artifact, 0.0, key=key, description=text)

    def update(self, line: str) -> None:
        progress = self._parser.parse(line)
        now = time.monotonic()
        if progress is not None and now - self._updated >= PROGRESS_EVERY_S:
            self._updated = now
            self._show(progress.percent, str(progress))

    def finish(self, outcome: StageOutcome) -> None:
        self._show(100.0, f"{self._stage}: {outcome.outcome}")

    def _show(self, percent: float, text: str) -> None:
        if self._id is not None:
            started = time.monotonic()
            ignore_api_errors(update_progress_artifact, self._id, progress=percent, description=escape_markdown(text))
            if time.monotonic() - started > SLOW_S:  # the server is unavailable and Prefect has retried
                self._updated = time.monotonic() + PAUSE_S


def _show_failure(error: StageFailedError) -> None:
    tail = [redact(line) for line in error.tail]
    text = (
        f"**{escape_markdown(error.reason)}**\n\n"
        + (f"What to do: {escape_markdown(error.action)}\n\n" if error.action else "")
        + f"Exit code {error.exit_code} ({error.kind}); {'transient' if error.transient else 'not transient: no retry'}."
        + f"\n\nLast lines of its log:\n\n{fenced(tail)}"
    )
    key = artifact_key("failure", error.stage)
    ignore_api_errors(create_markdown_artifact, text, key=key, description=f"Why {error.stage} failed")
