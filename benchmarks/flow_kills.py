"""`kill -9` of a flow run, of DVC or of a stage at random moments; then the schedule goes on. What is left, and is it right?

    python -m benchmarks.flow_kills                 # the tiny project of tests/flows, about 5 minutes
    python -m benchmarks.flow_kills --demo          # the real pipeline on the demo data at reduced size, about an hour

An undisturbed run gives the outs to compare with. Then runs are started one after the other, as a schedule does, and one of
their processes is killed at a random moment, until that has happened `--kills` times; a run that ends in peace is compared, and
the project begins again from nothing. At the end: outs byte-equal (DVC's md5), no lock held, no process left, no run Running.
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

PROJECT = Path(__file__).resolve().parents[1]

FLOW = """
import sys
from flows.pipeline import reproduce
state = reproduce(parameters={"overrides": sys.argv[1:]}, return_state=True)
print("ended", state.state_details.flow_run_id, state.name, state.message, flush=True)
sys.exit(0 if state.is_completed() else 1)
"""


@dataclass(frozen=True)
class Case:
    """A project to run, made anew for each round, and the parameters of its runs."""

    make: Callable[[Path], Path]
    overrides: tuple[str, ...]

    def build(self, folder: Path) -> Path:
        """A new copy."""
        return self.make(folder)


def tiny_case() -> Case:
    """Stages that take about two seconds each."""
    return Case(dvc_project.build, ("count.pause=2.0", "join.pause=2.0", "model.pause=2.0"))


def demo_case() -> Case:
    """The repository at HEAD, without results, with the reductions of the pipeline test."""
    from tests.pipeline.test_demo import SHRUNK

    def clone(folder: Path) -> Path:
        subprocess.run(["git", "clone", "--quiet", "--shared", str(PROJECT), str(folder)], check=True)
        shutil.copytree(PROJECT / ".cache/wheels", folder / ".cache/wheels")  # downloads are not what is tested
        (folder / "dvc.lock").unlink()
        dvc_project.commit(folder, "without results")
        return folder

    return Case(clone, tuple(f"{key}={value}" for key, value in SHRUNK.items()))


def start(project: Path, case: Case, log: Path) -> subprocess.Popen[bytes]:
    """A flow run as a process."""
    environment = {
        **dvc_project.environment(), "SONIFY_PROJECT": str(project), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1",
        "SONIFY_TRACKING": "off",
    }  # fmt: skip
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-c", FLOW, *case.overrides], cwd=project, env=environment, stdout=output, stderr=output
        )


def outs(project: Path) -> dict[str, str]:
    """md5 of every out on the newest run branch, without the reports that hold durations."""
    branch = last_run_branch(project)
    assert branch, "the run has left no branch"
    lock = YAML(typ="safe").load(read_committed(project, branch, "dvc.lock") or "")
    timed = {f"reports/{name}.json" for name in lock["stages"]}
    return {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"] if out["path"] not in timed}


def victim(process: subprocess.Popen[bytes], chance: random.Random) -> tuple[str, psutil.Process] | None:
    """The flow's own process, or one of the tree it started."""
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
        if "leash.py" in line:
            kinds["leash"] = child
        elif "-m dvc" in line:
            kinds["dvc"] = child
        elif "pipeline_steps" in line or "work.py" in line:
            kinds["stage"] = child
    kind = chance.choice(sorted(kinds.keys() - {"flow"}) or ["flow"]) if chance.random() < 0.7 else "flow"
    return kind, kinds[kind]


def main() -> None:
    """Kill, go on, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    case = demo_case() if options.demo else tiny_case()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_environment(folder)
        os.environ["PREFECT_HOME"], os.environ["PREFECT_API_URL"] = str(folder / "prefect"), ""
        with prefect_server(folder, free_port()):
            report(case, folder, options.kills, chance)


def report(case: Case, folder: Path, kills: int, chance: random.Random) -> None:
    """The rounds."""
    log = folder / "runs.log"
    calm = case.build(folder / "calm")
    began = time.monotonic()
    if start(calm, case, log).wait():
        sys.exit(log.read_text()[-3000:])
    usual = time.monotonic() - began
    wanted = outs(calm)
    print(f"undisturbed: {usual:.0f} s, {len(wanted)} outs", flush=True)
    done, number, equal, rounds = Counter[str](), 0, 0, 0
    project = case.build(folder / "round-0")
    while True:
        process = start(project, case, log)
        if sum(done.values()) < kills:
            try:
                process.wait(timeout=chance.uniform(0.1, 0.9) * usual)
            except subprocess.TimeoutExpired:
                chosen = victim(process, chance)
                if chosen is not None:
                    chosen[1].kill()
                    done[chosen[0]] += 1
                    print(f"kill {sum(done.values())}: {chosen[0]}", flush=True)
        code = process.wait()
        if code:
            continue  # killed or failed: the schedule starts the next one
        rounds += 1
        equal += outs(project) == wanted
        check_clean(project)
        if sum(done.values()) >= kills:
            break
        number += 1
        project = case.build(folder / f"round-{number}")
    states = run_states()
    print(f"killed: {dict(done)}; rounds that ended in peace: {rounds}, outs byte-equal in {equal}")
    print(f"states of all runs: {dict(states)}; left Running: {states['Running']}")
    if equal != rounds or states["Running"]:
        sys.exit("not as it should be; " + log.read_text()[-3000:])


def check_clean(project: Path) -> None:
    """No lock, no record of a run that died, no process at work in the project."""
    with workspace_lock(project, {"name": "check", "flow_run_id": ""}, 0.0) as left:
        assert left is None, left
    for process in psutil.process_iter():
        try:
            assert project not in Path(process.cwd()).parents, process
        except psutil.Error:
            continue


def run_states() -> Counter[str]:
    """How many runs and task runs are in which state, on the server. Those that ended a moment ago are waited for."""
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
