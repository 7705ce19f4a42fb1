"""Artifacts at the end of a run: durations and cache hits, metrics compared with the last run, report, links to MLflow."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from flows.artifact_tables import metrics_diff, metrics_text, stage_rows, table
from flows.dvc_graph import PlannedStage
from flows.dvc_subprocess import RAN, RESTORED, StageOutcome
from flows.git_worktree import RunWorkspace, has_git, last_run_branch, read_committed
from flows.stage_task import ignore_api_errors
from pipeline_steps.core.atomic import link_or_copy
from pipeline_steps.core.escape import escape_markdown
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.lineage.dvc_digests import lock_outs, read_lock

KEPT_REPORTS = 20
REPORTS = ".runs/reports"


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Outcome by stage, branch with the results (None: nothing changed) and address of the report (None: no report)."""

    outcomes: Mapping[str, str]
    branch: str | None
    report: str | None

    def __str__(self) -> str:
        text = ", ".join(f"{count} {outcome}" for outcome, count in Counter(self.outcomes.values()).items()) or "nothing to do"
        return f"{text}; results on branch {self.branch}" if self.branch else text


def show_stages(workspace: RunWorkspace, plan: Sequence[PlannedStage], done: Sequence[StageOutcome]) -> None:
    """Create the table of durations, item counts and cache hits of every stage."""
    reports = {each.node.name: _stage_report(workspace.root, each) for each in plan}
    rows = stage_rows(plan, {each.name: each for each in done}, reports)
    ignore_api_errors(create_table_artifact, rows, key="stages", description="Durations and cache hits by stage")


def show_metrics(workspace: RunWorkspace, plan: Sequence[PlannedStage]) -> None:
    """Create the table of metrics compared with the newest run branch, or with the run's commit if there is none."""
    if not has_git(workspace.project):
        return
    last = last_run_branch(workspace.project)
    baseline = last or workspace.commit or "HEAD"
    paths = [path for each in reversed(plan) for path in each.node.metrics]  # metrics of the last stage first
    old = {path: read_committed(workspace.project, baseline, path) for path in paths}
    new = {path: _text(workspace.root / path) for path in paths}
    text = metrics_text(metrics_diff(old, new), last or f"the commit of this run ({baseline[:12]})")
    ignore_api_errors(create_markdown_artifact, text, key="metrics", description="Metrics compared with the last run")


def publish_report(workspace: RunWorkspace, name: str) -> str | None:
    """Copy the report out of the worktree (hard links) and return its address; None if there is no report."""
    source = ProjectPaths(workspace.root).reports
    if not (source / "index.html").is_file():
        return None
    if not workspace.isolated:
        return f"{report_base()}/current/index.html"
    folder = workspace.project / REPORTS
    shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(source, folder / name, copy_function=link_or_copy)
    by_age = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in by_age[KEPT_REPORTS:]:
        shutil.rmtree(old, ignore_errors=True)
    return f"{report_base()}/runs/{name}/index.html"


def report_base() -> str:
    """Base URL of the report server: SONIFY_REPORTS_URL or the default of `python -m flows.serve`."""
    return os.environ.get("SONIFY_REPORTS_URL", "http://127.0.0.1:4201").rstrip("/")


def show_links(
    workspace: RunWorkspace, flow_run_id: str, done: Sequence[StageOutcome], plan: Sequence[PlannedStage], report: str | None
) -> None:
    """Create links to the report and to the MLflow runs of this flow run and of restored models."""
    if report:
        ignore_api_errors(create_link_artifact, report, link_text="Report", key="report", description="Report of this run")
    outcomes = {each.name: each.outcome for each in done}
    if not set(outcomes.values()) & {RAN, RESTORED}:
        return
    restored = {out for each in plan if outcomes.get(each.node.name) == RESTORED for out in each.node.outs}
    ignore_api_errors(_show_mlflow_runs, workspace, flow_run_id, restored)


def _show_mlflow_runs(workspace: RunWorkspace, flow_run_id: str, restored: Collection[str]) -> None:
    from pipeline_steps.tracking.registry.run_links import linked_runs
    from pipeline_steps.tracking.settings import read_settings

    layout = ProjectPaths(workspace.project)
    settings = read_settings(layout)
    if settings.mode == "off" or settings.is_missing:
        return
    locked = lock_outs(read_lock(ProjectPaths(workspace.root).lock))
    runs = linked_runs(layout, flow_run_id, [locked[out] for out in restored if out in locked])
    if runs:
        lines = table(("stage", "state", "made by"), [(run.stage, run.status, run.made_by) for run in runs])
        links = "\n".join(f"- [{escape_markdown(run.stage)}]({run.url})" for run in runs)
        create_markdown_artifact(f"{lines}\n\n{links}", key="mlflow", description="MLflow runs")


def _stage_report(root: Path, each: PlannedStage) -> dict[str, Any]:
    """First JSON file of a stage with item counts, and the duration and cache use of its execution; empty if there is none."""
    for path in (out for out in each.node.outs if out.endswith(".json")):
        try:
            value = json.loads(_text(root / path) or "")
        except ValueError:
            continue
        if isinstance(value, dict) and "n_in" in value:
            runtime = _text(ProjectPaths(root).runtime(each.node.name))
            return value | (json.loads(runtime) if runtime else {})
    return {}


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
