"""Soak test: `kill -9` of a flow run, DVC or a stage at random moments, followed by further runs.

    python -m tests.soak.flow_kills                 # small project of tests/flows, about 5 minutes
    python -m tests.soak.flow_kills --demo          # the pipeline on the demo data at reduced size, about an hour

An undisturbed run gives the expected outs. Then runs are started one after the other, like a schedule, and one of their
processes is killed at a random moment, until `--kills` processes were killed. The outs of each completed run are compared, and
the project is created again. Required: outs equal (DVC's md5), no lock held, no process left, no run in state Running.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from benchmarks.servers import free_port
from flows.git_worktree import last_run_branch, read_committed
from flows.serve import prefect_server, prepare_environment
from flows.workspace_lock import workspace_lock
from tests.flows import dvc_project

PROJECT = Path(__file__).resolve().parents[2]
FLOW = """
import sys
from flows.pipeline import reproduce
state = reproduce(parameters={"overrides": sys.argv[1:]}, return_state=True)
print("ended", state.state_details.flow_run_id, state.name, state.message, flush=True)
sys.exit(0 if state.is_completed() else 1)
"""


@dataclass(frozen=True)
class Case:
    """Function that creates the project in a new folder, and the parameters of its runs."""

    build: Callable[[Path], Path]
    overrides: tuple[str, ...]


def small_case() -> Case:
    """Small project whose stages take about two seconds each."""
    return Case(dvc_project.build, ("count.pause=2.0", "join.pause=2.0", "model.pause=2.0"))


def demo_case() -> Case:
    """Repository at HEAD without results, with the reduced parameters of the pipeline test."""
    from tests.pipeline.test_demo import SHRUNK

    def clone(folder: Path) -> Path:
        subprocess.run(["git", "clone", "--quiet", "--shared", str(PROJECT), str(folder)], check=True)
        shutil.copytree(PROJECT / ".cache/wheels", folder / ".cache/wheels")  # no downloads during the test
        (folder / "dvc.lock").unlink()
        dvc_project.commit(folder, "without results")
        return folder

    return Case(clone, tuple(f"{key}={value}" for key, value in SHRUNK.items()))


def start(project: Path, case: Case, log: Path) -> subprocess.Popen[bytes]:
    """Start a flow run as a process."""
    environment = {
        **dvc_project.environment(), "SONIFY_PROJECT": str(project), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1",
        "SONIFY_TRACKING": "off",
    }  # fmt: skip
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", FLOW, *case.overrides], cwd=project, env=environment, stdout=output, stderr=output
        )


def outs(project: Path) -> dict[str, str]:
    """md5 of every out on the newest run branch, except the reports with durations."""
    branch = last_run_branch(project)
    assert branch, "there is no run branch"
    lock = YAML(typ="safe").load(read_committed(project, branch, "dvc.lock") or "")
    timed = {f"reports/{name}.json" for name in lock["stages"]}
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"] if out["path"] not in timed}


def choose_process(process: subprocess.Popen[bytes], generator: random.Random) -> tuple[str, psutil.Process] | None:
    """Kind and process to kill: the flow or one of its descendants. None if the flow has ended."""
    try:
        flow = psutil.Process(process.pid)
        tree = flow.children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    kinds = {"flow": flow}
    for child in tree:
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "process_guard.py" in line:
            kinds["guard"] = child
        elif "-m dvc" in line:
            kinds["dvc"] = child
        elif "pipeline_steps" in line or "work.py" in line:
            kinds["stage"] = child
    kind = generator.choice(sorted(kinds.keys() - {"flow"}) or ["flow"]) if generator.random() < 0.7 else "flow"
    return kind, kinds[kind]


def main() -> None:
    """Run the soak test and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    case = demo_case() if options.demo else small_case()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_environment(folder)
        os.environ["PREFECT_HOME"], os.environ["PREFECT_API_URL"] = str(folder / "prefect"), ""
        with prefect_server(folder, free_port()):
            run_rounds(case, folder, options.kills, generator)


def run_rounds(case: Case, folder: Path, kills: int, generator: random.Random) -> None:
    """Run and kill until `kills` processes were killed; exits with an error if a requirement is not met."""
    log = folder / "runs.log"
    undisturbed = case.build(folder / "undisturbed")
    started = time.monotonic()
    if start(undisturbed, case, log).wait():
        sys.exit(log.read_text()[-3000:])
    duration = time.monotonic() - started
    expected = outs(undisturbed)
    print(f"undisturbed: {duration:.0f} s, {len(expected)} outs", flush=True)
    killed, equal, rounds = Counter[str](), 0, 0
    project = case.build(folder / "round-0")
    while True:
        process = start(project, case, log)
        if killed.total() < kills:
            try:
                process.wait(timeout=generator.uniform(0.1, 0.9) * duration)
            except subprocess.TimeoutExpired:
                chosen = choose_process(process, generator)
                if chosen is not None:
                    chosen[1].kill()
                    killed[chosen[0]] += 1
                    print(f"kill {killed.total()}: {chosen[0]}", flush=True)
        if process.wait():
            continue  # killed or failed: the schedule starts the next run
        rounds += 1
        equal += outs(project) == expected
        check_clean(project)
        if killed.total() >= kills:
            break
        project = case.build(folder / f"round-{rounds}")
    states = run_states()
    print(f"killed: {dict(killed)}; completed rounds: {rounds}, outs equal in {equal}")
    print(f"states of all runs: {dict(states)}; left Running: {states['Running']}")
    if equal != rounds or states["Running"]:
        sys.exit("failed: " + log.read_text()[-3000:])


def check_clean(project: Path) -> None:
    """Check that there is no lock, no record of a crashed run and no process in the project."""
    with workspace_lock(project, {"name": "check", "flow_run_id": ""}, 0.0) as crashed:
        assert crashed is None, crashed
    for process in psutil.process_iter():
        try:
            assert project not in Path(process.cwd()).parents, process
        except psutil.Error:
            continue


def run_states() -> Counter[str]:
    """Number of runs and task runs by state on the server, after a short wait for runs that are still Running."""
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + 20
    while True:
        with get_client(sync_client=True) as client:
            runs = [*client.read_flow_runs(limit=200), *client.read_task_runs(limit=200)]
        states = Counter(run.state.name if run.state else "?" for run in runs)
        if not states["Running"] or time.monotonic() > deadline:
            return states
        time.sleep(1)


if __name__ == "__main__":
    main()
