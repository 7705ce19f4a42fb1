"""The flows that run stages: reproduce, refresh_data, train_and_evaluate, nightly. Which: DVC's graph and `meta.flow`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run

from flows.artifact_tables import plan_rows, plan_text
from flows.crashed_runs import mark_dead_run_crashed
from flows.dvc_graph import PlannedStage, StageNode, make_plan, modified_dvc_sources, read_graph, stages_of_flow
from flows.dvc_subprocess import StageOutcome
from flows.flow_parameters import NightlyParameters, ReproduceParameters, RunParameters
from flows.git_worktree import (
    RunWorkspace,
    commit_results,
    find_project,
    has_git,
    is_clean,
    open_workspace,
    restore_outs,
    safe_name,
)
from flows.promote import decide_promotion, final_state
from flows.run_summary import RunSummary, publish_report, show_links, show_metrics, show_stages
from flows.stage_task import ignore_api_errors, stage_task
from flows.workspace_lock import workspace_lock
from pipeline_steps.core.errors import DataError

DATA, MODEL = "data", "model"
"""Values of `meta.flow` in dvc.yaml: stages that make the pairs, and stages that make and judge the model."""

Targets = Callable[[Sequence[StageNode]], tuple[str, ...]]


@flow(name="reproduce", description="Bring the pipeline (or chosen stages) up to date: plan, stages in order, summary.")
def reproduce(parameters: ReproduceParameters = ReproduceParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Every stage that has a reason to run, in DVC's order."""
    stages = tuple(str(stage) for stage in parameters.stages)
    return final_state(lambda: str(run_pipeline(parameters, lambda nodes: stages)))


@flow(name="refresh-data", description="Bring the data up to date, from the raw pools to the pairs.")
def refresh_data(parameters: RunParameters = RunParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """The stages of dvc.yaml with `meta: {flow: data}`."""
    return final_state(lambda: str(run_pipeline(parameters, lambda nodes: stages_of_flow(nodes, DATA))))


@flow(name="train-and-evaluate", description="Train and judge a model on the data as it is; stale data stops the run.")
def train_and_evaluate(parameters: RunParameters = RunParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """The stages of dvc.yaml with `meta: {flow: model}`; those before them must be up to date."""
    return final_state(lambda: str(run_pipeline(parameters, lambda nodes: stages_of_flow(nodes, MODEL), alone=True)))


@flow(name="nightly", description="All of it: data, model, report, then the promotion.")
def nightly(parameters: NightlyParameters = NightlyParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Every stage that has a reason to run, then champion against challenger."""

    def work() -> str:
        summary = run_pipeline(parameters, lambda nodes: ())
        return f"{summary}; {decide_promotion(parameters.promotion, wait_here=False)}"

    return final_state(work)


def run_pipeline(parameters: RunParameters, targets: Targets, *, alone: bool = False) -> RunSummary:
    """Plan and run in a workspace of its own.

    Args:
        parameters: see the form.
        targets: names of the stages to bring up to date, from the graph; none: all.
        alone: what the targets depend on must be up to date already.

    Raises:
        StageError: with the exit code of `pipeline_steps.core.errors`.
    """
    project, log = find_project(), get_run_logger()
    name, run_id = safe_name(flow_run.get_name() or "run"), str(flow_run.get_id() or "")
    with workspace_lock(project, {"name": name, "flow_run_id": run_id}, parameters.wait_minutes * 60.0, log.info) as left:
        mark_dead_run_crashed(left, log.warning, own=run_id)
        if _is_plain_request(project, parameters):
            here = RunWorkspace(project, project)
            plan = make_plan(project, targets(read_graph(project)))
            if not any(each.runs for each in plan):
                return _run(here, plan, targets, parameters, alone, name, run_id)
        with open_workspace(project, name, parameters.request()) as workspace:
            log.info("%s%s", workspace.root, f" at {workspace.commit[:12]}" if workspace.commit else "")
            for change in workspace.changes:
                log.info("parameter %s", change)
            if workspace.isolated and not is_clean(project):
                log.warning("the working tree has changes that are not committed: they are not part of this run")
            check_sources(workspace)
            plan = make_plan(workspace.root, targets(read_graph(workspace.root)), force=parameters.force)
            return _run(workspace, plan, targets, parameters, alone, name, run_id)


def _is_plain_request(project: Path, parameters: RunParameters) -> bool:
    """Whether the run is about the working tree as it stands; if that is up to date as well, no worktree need be made."""
    request = parameters.request()
    if parameters.force or request.changes_params or request.revision != "HEAD" or not has_git(project):
        return False
    return is_clean(project)


@task(name="check sources", task_run_name="check sources", cache_policy=NO_CACHE, persist_result=False)
def check_sources(workspace: RunWorkspace) -> None:
    """Bring the recorded outs into the workspace; data behind a `.dvc` file must be what the file says.

    Raises:
        DataError: it is not: DVC would record bytes that its cache does not hold.
    """
    log = get_run_logger()
    if workspace.isolated:
        missing = restore_outs(workspace)
        if missing:
            log.warning("not everything recorded is in the cache; its stages will run again: %s", missing)
    changed = modified_dvc_sources(workspace.root)
    if changed:
        path, what = next(iter(changed.items()))
        raise DataError(f"{path} is {what}, but its .dvc file was not updated", f"dvc add {path}, and commit the .dvc file")


def _run(
    workspace: RunWorkspace,
    plan: Sequence[PlannedStage],
    targets: Targets,
    parameters: RunParameters,
    alone: bool,
    name: str,
    run_id: str,
) -> RunSummary:
    log = get_run_logger()
    log.info("plan:\n%s", plan_text(plan))
    ignore_api_errors(lambda: create_table_artifact(plan_rows(plan), key="plan", description="What this run does, and why"))
    chosen = targets([each.node for each in plan]) or tuple(each.node.name for each in plan)
    if alone and (stale := [each for each in plan if each.runs and each.node.name not in chosen]):
        raise DataError(
            f"{stale[0].node.name} is not up to date ({stale[0].why}), and this flow takes the data as it is",
            "run refresh-data and give its branch as the revision, or run reproduce",
        )
    done: list[StageOutcome] = []
    states: dict[str, State[StageOutcome]] = {}  # what the arrows of the UI are drawn from
    try:
        for each in plan:
            force = parameters.force and each.node.name in chosen
            states[each.node.name] = state = stage_task(each)(
                each,
                workspace,
                force,
                return_state=True,
                wait_for=[states[name] for name in each.node.upstream if name in states],
            )
            done.append(state.result())
    finally:
        show_stages(workspace, plan, done)
    return publish_results(workspace, plan, done, name, run_id)


def publish_results(
    workspace: RunWorkspace, plan: Sequence[PlannedStage], done: Sequence[StageOutcome], name: str, run_id: str
) -> RunSummary:
    """Show what came out, and commit it on a run branch."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if any(each.runs for each in plan):
        show_metrics(workspace, plan)
    branch = None
    if workspace.isolated:
        changes = "\n".join(workspace.changes) or "parameters as committed"
        message = f"Run {name}\n\n{plan_text(plan)}\n\n{changes}\n\nFlow-run: {run_id or 'none'}\nFrom: {workspace.commit}\n"
        branch = commit_results(workspace, name, message, [each.node for each in plan])
    report = publish_report(workspace, name)
    show_links(workspace, run_id, done, plan, report)
    summary = RunSummary({each.name: each.outcome for each in done}, branch, report)
    get_run_logger().info("%s", summary)
    return summary
