"""Overhead of Prefect: a `reproduce` run without changes compared with plain `dvc repro`, interleaved.

    python -m benchmarks.flow_overhead [--rounds 5]

Uses a clone of the repository at HEAD with the project's DVC cache, and a Prefect server on a free port. Bar: the flow run
takes at most 25 s longer than `dvc repro` on 2 cores. Whole processes are timed: imports, plan, states, artifacts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.servers import free_port
from flows.dvc_graph import link_dvc_cache, read_graph
from flows.serve import prefect_server, prepare_environment

PROJECT = Path(__file__).resolve().parents[1]

FLOW = """
import json, sys
from flows.pipeline import reproduce
state = reproduce(parameters=json.loads(sys.argv[1]), return_state=True)
assert state.is_completed() and "unchanged" in state.message and "ran" not in state.message, state.message
"""


def seconds(command: list[str], clone: Path) -> float:
    """Wall time of a command that must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(clone), "SONIFY_PROJECT": str(clone)}
    started = time.monotonic()
    done = subprocess.run(command, cwd=clone, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:80]}: {(done.stdout + done.stderr)[-2000:]}")
    return time.monotonic() - started


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", "--shared", str(PROJECT), str(clone)], check=True)
        link_dvc_cache(PROJECT, clone)
        dvc = [sys.executable, "-m", "dvc"]
        seconds([*dvc, "checkout", "--quiet"], clone)
        prepare_environment(clone)
        os.environ["PREFECT_HOME"] = str(Path(folder) / "prefect")
        os.environ["PREFECT_API_URL"] = ""
        commands = {
            "dvc repro": [*dvc, "repro", "--quiet"],
            "reproduce": [sys.executable, "-c", FLOW, "{}"],
            "reproduce in a worktree": [sys.executable, "-c", FLOW, '{"revision": "HEAD~0"}'],
        }
        with prefect_server(clone, free_port()):
            times: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(rounds):
                for name, command in commands.items():
                    times[name].append(seconds(command, clone))
        stages = len(read_graph(clone))
    base = statistics.median(times["dvc repro"])
    print(f"{stages} stages, no changes, {rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<26}{'median s':>10}{'best s':>10}{'worst s':>10}{'over dvc repro':>16}")
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:<26}{middle:>10.1f}{min(values):>10.1f}{max(values):>10.1f}{middle - base:>14.1f} s")


if __name__ == "__main__":
    main()
