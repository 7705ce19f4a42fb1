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

from flows.graph import PlannedStage, StageNode, changed_sources, in_group, make_plan, read_graph
from flows.lock import hold
from flows.orphans import settle
from flows.parameters import NightlyParameters, ReproduceParameters, RunParameters
from flows.promote import decide_promotion, ended
from flows.run_stage import quietly, stage_task
from flows.stage_process import StageOutcome
from flows.summary import Summary, keep_report, show_links, show_metrics, show_stages
from flows.tables import plan_rows, plan_text
from flows.workspace import Workspace, find_project, has_git, is_clean, open_workspace, publish, restore_outs, safe_name
from pipeline_steps.core.errors import DataError

DATA, MODEL = "data", "model"
"""Values of `meta.flow` in dvc.yaml: stages that make the pairs, and stages that make and judge the model."""

Targets = Callable[[Sequence[StageNode]], tuple[str, ...]]


@flow(name="reproduce", description="Bring the pipeline (or chosen stages) up to date: plan, stages in order, summary.")
def reproduce(parameters: ReproduceParameters = ReproduceParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Every stage that has a reason to run, in DVC's order."""
    stages = tuple(str(stage) for stage in parameters.stages)
    return ended(lambda: str(run_pipeline(parameters, lambda nodes: stages)))


@flow(name="refresh-data", description="Bring the data up to date, from the raw pools to the pairs.")
def refresh_data(parameters: RunParameters = RunParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """The stages of dvc.yaml with `meta: {flow: data}`."""
    return ended(lambda: str(run_pipeline(parameters, lambda nodes: in_group(nodes, DATA))))


@flow(name="train-and-evaluate", description="Train and judge a model on the data as it is; stale data stops the run.")
def train_and_evaluate(parameters: RunParameters = RunParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """The stages of dvc.yaml with `meta: {flow: model}`; those before them must be up to date."""
    return ended(lambda: str(run_pipeline(parameters, lambda nodes: in_group(nodes, MODEL), alone=True)))


@flow(name="nightly", description="All of it: data, model, report, then the promotion.")
def nightly(parameters: NightlyParameters = NightlyParameters()) -> State[None]:  # noqa: B008 - a frozen model
    """Every stage that has a reason to run, then champion against challenger."""

    def work() -> str:
        summary = run_pipeline(parameters, lambda nodes: ())
        return f"{summary}; {decide_promotion(parameters.promotion, wait_here=False)}"

    return ended(work)


def run_pipeline(parameters: RunParameters, targets: Targets, *, alone: bool = False) -> Summary:
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
    with hold(project, {"name": name, "flow_run_id": run_id}, parameters.wait_minutes * 60.0, log.info) as left:
        settle(left, log.warning, own=run_id)
        if _asks_for_nothing(project, parameters):
            here = Workspace(project, project)
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


def _asks_for_nothing(project: Path, parameters: RunParameters) -> bool:
    """Whether the run is about the working tree as it stands; if that is up to date as well, no worktree need be made."""
    request = parameters.request()
    if parameters.force or request.changes_params or request.revision != "HEAD" or not has_git(project):
        return False
    return is_clean(project)


@task(name="check sources", task_run_name="check sources", cache_policy=NO_CACHE, persist_result=False)
def check_sources(workspace: Workspace) -> None:
    """Bring the recorded outs into the workspace; data behind a `.dvc` file must be what the file says.

    Raises:
        DataError: it is not: DVC would record bytes that its cache does not hold.
    """
    log = get_run_logger()
    if workspace.isolated:
        missing = restore_outs(workspace)
        if missing:
            log.warning("not everything recorded is in the cache; its stages will run again: %s", missing)
    changed = changed_sources(workspace.root)
    if changed:
        path, what = next(iter(changed.items()))
        raise DataError(f"{path} is {what}, but its .dvc file was not updated", f"dvc add {path}, and commit the .dvc file")


def _run(
    workspace: Workspace,
    plan: Sequence[PlannedStage],
    targets: Targets,
    parameters: RunParameters,
    alone: bool,
    name: str,
    run_id: str,
) -> Summary:
    log = get_run_logger()
    log.info("plan:\n%s", plan_text(plan))
    quietly(lambda: create_table_artifact(plan_rows(plan), key="plan", description="What this run does, and why"))
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
    return finish(workspace, plan, done, name, run_id)


def finish(workspace: Workspace, plan: Sequence[PlannedStage], done: Sequence[StageOutcome], name: str, run_id: str) -> Summary:
    """Show what came out, and commit it on a run branch."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if any(each.runs for each in plan):
        show_metrics(workspace, plan)
    branch = None
    if workspace.isolated:
        changes = "\n".join(workspace.changes) or "parameters as committed"
        message = f"Run {name}\n\n{plan_text(plan)}\n\n{changes}\n\nFlow-run: {run_id or 'none'}\nFrom: {workspace.commit}\n"
        branch = publish(workspace, name, message, [each.node for each in plan])
    report = keep_report(workspace, name)
    show_links(workspace, run_id, done, plan, report)
    summary = Summary({each.name: each.outcome for each in done}, branch, report)
    get_run_logger().info("%s", summary)
    return summary
