"""Tests of the flows on a Prefect server: states, artifacts, retries, branches, recovery after `kill -9`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.flows import dvc_project

PROJECT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("prefect_api")


def reproduce(**parameters: Any) -> Any:
    """Run the flow; returns its final state."""
    from flows.pipeline import reproduce as flow

    return flow(parameters=parameters, return_state=True)


def artifacts(state: Any) -> dict[str, Any]:
    """Newest data of the run's artifacts by key."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
        found = client.read_artifacts(artifact_filter=chosen)
    return {item.key: json.loads(item.data) if item.type == "table" else item.data for item in found}


def task_states(run_id: UUID) -> dict[str, tuple[str, int]]:
    """State name and number of attempts by task."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    def read() -> dict[str, tuple[str, int]]:
        with get_client(sync_client=True) as client:
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))
        return {task.name: (task.state.name if task.state else "?", task.run_count) for task in tasks}

    deadline = time.monotonic() + 20  # the server stores task runs with a delay
    while time.monotonic() < deadline:
        found = read()
        if found and not {"Running", "Pending"} & {name for name, _ in found.values()}:
            return found
        time.sleep(0.2)
    return read()


def test_run_with_changes_and_run_without(project: Path) -> None:
    state = reproduce(overrides=["model.seed=9"], seed=-1)
    assert state.is_completed(), state.message
    branch = dvc_project.git(project, "branch", "--list", "runs/*").strip()
    assert state.message == f"2 unchanged, 1 ran; results on branch {branch}"
    shown = artifacts(state)
    assert [row["stage"] for row in shown["plan"]] == ["count", "join", "model"]
    assert shown["plan"][2]["why"] == r"changed parameter model.seed 0 -&gt; 9"
    assert [row["outcome"] for row in shown["stages"]] == ["unchanged", "unchanged", "ran"]
    assert shown["progress-model"] == 100.0
    assert "No metric differs" in shown["metrics"]
    assert task_states(state.state_details.flow_run_id) == {
        "check sources": ("Completed", 1),
        "count": ("Completed", 1),
        "join": ("Completed", 1),
        "model": ("Completed", 1),
    }
    assert dvc_project.git(project, "status", "--porcelain") == ""

    again = reproduce()
    assert again.message == "3 unchanged"
    assert not list((project / ".runs/worktrees").iterdir())


def test_invalid_parameters_fail_before_any_stage(project: Path) -> None:
    state = reproduce(overrides=["modle.seed=9"])
    assert state.is_failed()
    assert state.message == "modle.seed is unknown -> did you mean model?"
    assert "Exit code 2" in artifacts(state)["failure"]
    assert set(artifacts(state)) == {"failure"}, "there is no plan"


def test_only_transient_failures_are_retried(project: Path) -> None:
    failed = reproduce(overrides=["model.fail=data"])
    assert failed.message == "model: the input is not valid -> replace it"
    shown = artifacts(failed)
    assert "model: the input is not valid" in shown["failure-model"].split("Last lines of its log")[1]
    assert [row["outcome"] for row in shown["stages"]] == ["unchanged", "unchanged", "not run"]
    assert task_states(failed.state_details.flow_run_id)["model"] == ("Failed", 1)
    assert len(list((project / ".runs/worktrees").iterdir())) == 1, "kept for inspection"

    (project / ".runs/failed-once").unlink()
    flaky = reproduce(overrides=["model.fail=flaky"])
    assert flaky.is_completed(), flaky.message
    assert task_states(flaky.state_details.flow_run_id)["model"] == ("Completed", 2)


def test_flows_run_parts_of_the_graph(project: Path) -> None:
    from flows.pipeline import refresh_data, train_and_evaluate

    stale = train_and_evaluate(parameters={"overrides": ["count.power=3"]}, return_state=True)
    assert stale.is_failed()
    assert "count is not up to date (changed parameter count.power 2 -> 3)" in stale.message
    fresh = refresh_data(parameters={"overrides": ["join.sign=-"]}, return_state=True)
    assert fresh.message.startswith("1 unchanged, 1 ran; results on branch runs/")
    branch = fresh.message.rsplit(" ", 1)[1]
    trained = train_and_evaluate(parameters={"revision": branch}, return_state=True)
    assert trained.message.startswith("2 unchanged, 1 ran; results on branch runs/")


def test_second_run_is_refused(project: Path) -> None:
    from flows.workspace_lock import workspace_lock

    with workspace_lock(project, {"name": "somebody", "flow_run_id": ""}, 0.0):
        state = reproduce(wait_minutes=0, overrides=["model.seed=1"])
    assert state.is_failed()
    assert state.message.startswith("run somebody (PID ")
    assert dvc_project.git(project, "branch", "--list", "runs/*") == ""


RUN = """
import sys
from flows.pipeline import reproduce
state = reproduce(parameters={"overrides": sys.argv[1:]}, return_state=True)
print(state.message)
"""


def start(project: Path, api: str, *overrides: str) -> subprocess.Popen[str]:
    environment = {
        **dvc_project.environment(),
        "PREFECT_API_URL": api,
        "SONIFY_PROJECT": str(project),
        "PYTHONPATH": str(PROJECT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *overrides], cwd=project, env=environment, text=True, stdout=subprocess.PIPE
    )


def test_next_run_marks_a_killed_run_as_crashed(project: Path, prefect_api: str) -> None:
    from prefect.client.orchestration import get_client

    (project / ".runs").mkdir(exist_ok=True)
    killed = start(project, prefect_api, "model.fail=child")
    marker = project / ".runs/child.pid"
    deadline = time.monotonic() + 60
    while not marker.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    record = json.loads((project / ".runs/flow.json").read_text())
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    run_id = UUID(record["flow_run_id"])

    state = reproduce(overrides=["model.seed=4"])
    assert state.is_completed(), state.message
    with get_client(sync_client=True) as client:
        before = client.read_flow_run(run_id)
    assert before.state is not None
    assert before.state.is_crashed()
    assert task_states(run_id)["model"][0] == "Crashed"
    assert not (project / ".runs/flow.json").exists()


def test_retried_run_is_not_marked_as_crashed(project: Path) -> None:
    """*Retry* in the UI: the record of the killed attempt has the id of the running flow run."""
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    from flows.flow_parameters import ReproduceParameters
    from flows.pipeline import run_pipeline

    states = []

    def retried() -> None:
        (project / ".runs").mkdir(exist_ok=True)
        (project / ".runs/flow.json").write_text(json.dumps({"name": "x", "flow_run_id": flow_run.get_id(), "pid": 1}))
        run_pipeline(ReproduceParameters(), lambda nodes: ())
        with get_client(sync_client=True) as client:
            states.append(client.read_flow_run(UUID(flow_run.get_id())).state)

    state = flow(retried, name="retried")(return_state=True)
    assert state.is_completed(), state.message
    assert states[0].is_running(), states[0].message


def test_termination_ends_the_run_and_its_stage(project: Path, prefect_api: str) -> None:
    (project / ".runs").mkdir(exist_ok=True)
    process = start(project, prefect_api, "model.fail=child")
    marker = project / ".runs/child.pid"
    deadline = time.monotonic() + 60
    while not marker.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.communicate()
    assert dvc_project.has_exited(int(marker.read_text()))
    assert not (project / ".runs/flow.json").exists(), "the run ended normally"
