"""Flows that run stages: reproduce, refresh-data, train-and-evaluate, nightly. `meta.flow` in dvc.yaml selects the stages."""

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
from pipeline_steps.core.pool_check import check_project_pools
from pipeline_steps.core.project_paths import ProjectPaths

DATA, MODEL = "data", "model"
"""Values of `meta.flow` in dvc.yaml: stages that build the pairs, and stages that train and evaluate the model."""

Targets = Callable[[Sequence[StageNode]], tuple[str, ...]]


@flow(name="reproduce", description="Bring the pipeline or selected stages up to date.")
def reproduce(parameters: ReproduceParameters = ReproduceParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Run every stage that is not up to date, in DVC's order."""
    stages = tuple(str(stage) for stage in parameters.stages)
    return final_state(lambda: str(run_pipeline(parameters, lambda nodes: stages)))


@flow(name="refresh-data", description="Bring the data up to date, from the raw files to the pairs.")
def refresh_data(parameters: RunParameters = RunParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Run the stages of dvc.yaml with `meta: {flow: data}`."""
    return final_state(lambda: str(run_pipeline(parameters, lambda nodes: stages_of_flow(nodes, DATA))))


@flow(name="train-and-evaluate", description="Train and evaluate a model on the current data; fails if the data is stale.")
def train_and_evaluate(parameters: RunParameters = RunParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Run the stages of dvc.yaml with `meta: {flow: model}`; the stages that they depend on must be up to date."""
    return final_state(lambda: str(run_pipeline(parameters, lambda nodes: stages_of_flow(nodes, MODEL), only_targets=True)))


@flow(name="nightly", description="Bring the whole pipeline up to date, then start the promotion.")
def nightly(parameters: NightlyParameters = NightlyParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Run every stage that is not up to date, then decide the promotion."""

    def work() -> str:
        summary = run_pipeline(parameters, lambda nodes: ())
        return f"{summary}; {decide_promotion(parameters.promotion, wait_here=False)}"

    return final_state(work)


def run_pipeline(parameters: RunParameters, targets: Targets, *, only_targets: bool = False) -> RunSummary:
    """Plan and run stages in an isolated workspace.

    Args:
        parameters: parameters of the flow run.
        targets: function from the graph to the names of the target stages; an empty tuple: all stages.
        only_targets: the stages that the targets depend on must be up to date.

    Raises:
        StageError: the run failed.
    """
    project, log = find_project(), get_run_logger()
    name, run_id = run_identity()
    holder, wait_s = {"name": name, "flow_run_id": run_id}, parameters.wait_minutes * 60.0
    with workspace_lock(project, holder, wait_s, log.info) as crashed:
        mark_dead_run_crashed(crashed, log.warning, own_id=run_id)
        if _is_plain_request(project, parameters):
            check_project_pools(ProjectPaths(project))
            plan = make_plan(project, targets(read_graph(project)))
            if not any(each.runs for each in plan):
                return _run(RunWorkspace(project, project), plan, targets, parameters, only_targets)
        with open_workspace(project, name, parameters.request()) as workspace:
            log.info("%s%s", workspace.root, f" at {workspace.commit[:12]}" if workspace.commit else "")
            for change in workspace.changes:
                log.info("parameter %s", change)
            if workspace.isolated and not is_clean(project):
                log.warning("the working tree has uncommitted changes; they are not part of this run")
            check_sources(workspace)
            plan = make_plan(workspace.root, targets(read_graph(workspace.root)), force=parameters.force)
            return _run(workspace, plan, targets, parameters, only_targets)


def _is_plain_request(project: Path, parameters: RunParameters) -> bool:
    """Whether the run uses the working tree without any change; it needs no worktree if the tree is up to date."""
    request = parameters.request()
    changed = parameters.force or request.changes_params or request.revision != "HEAD"
    return not changed and has_git(project) and is_clean(project)


@task(name="check sources", task_run_name="check sources", cache_policy=NO_CACHE, persist_result=False)
def check_sources(workspace: RunWorkspace) -> None:
    """Restore the outs of `dvc.lock` in the workspace and check data tracked by `.dvc` files.

    Raises:
        DataError: DVC cannot hash the raw pool, or data differs from its `.dvc` file, so that DVC would record data that its
            cache does not have.
    """
    log = get_run_logger()
    check_project_pools(ProjectPaths(workspace.root))
    if workspace.isolated:
        missing = restore_outs(workspace)
        if missing:
            log.warning("outs are missing in DVC's cache, so their stages run again: %s", missing)
    changed = modified_dvc_sources(workspace.root)
    if changed:
        path, change = next(iter(changed.items()))
        raise DataError(f"{path} is {change}, but its .dvc file was not updated", f"dvc add {path}, and commit the .dvc file")


def run_identity() -> tuple[str, str]:
    """Name of the flow run, valid as the name of a folder and a branch, and its id."""
    return safe_name(flow_run.get_name() or "run"), str(flow_run.get_id() or "")


def _run(
    workspace: RunWorkspace, plan: Sequence[PlannedStage], targets: Targets, parameters: RunParameters, only_targets: bool
) -> RunSummary:
    """Run the stages of a plan, create the artifacts of the results, and commit them on a run branch."""
    log = get_run_logger()
    log.info("plan:\n%s", plan_text(plan))
    ignore_api_errors(create_table_artifact, plan_rows(plan), key="plan", description="Plan of this run")
    selected = targets([each.node for each in plan]) or tuple(each.node.name for each in plan)
    if only_targets and (stale := [each for each in plan if each.runs and each.node.name not in selected]):
        raise DataError(
            f"{stale[0].node.name} is not up to date ({stale[0].why}), and this flow does not run it",
            "run refresh-data and set its branch as the revision, or run reproduce",
        )
    done: list[StageOutcome] = []
    states: dict[str, State[StageOutcome]] = {}  # dependencies shown in the UI
    try:
        for each in plan:
            force = parameters.force and each.node.name in selected
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
    name, run_id = run_identity()
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
    log.info("%s", summary)
    return summary
