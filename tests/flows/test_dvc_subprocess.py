"""Tests of running a stage: outcomes, errors, time limits, and the end of all its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.dvc_subprocess import StageFailedError, load_stage_error, run_dvc_stage
from tests.flows import dvc_project

PROJECT = Path(__file__).resolve().parents[2]


def run(root: Path, name: str, timeout_s: float | None = None, **more: bool) -> tuple[str, list[str]]:
    lines: list[str] = []
    done = run_dvc_stage(name, root, timeout_s=timeout_s, environment=dvc_project.environment(), on_line=lines.append, **more)
    return done.outcome, lines


def set_param(root: Path, old: str, new: str) -> None:
    path = root / "params.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def child_of(root: Path) -> int:
    marker = root / ".runs/child.pid"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if marker.is_file() and marker.read_text():
            return int(marker.read_text())
        time.sleep(0.05)
    raise AssertionError("the stage did not start its child")


def test_outcomes(project: Path) -> None:
    assert run(project, "count")[0] == "unchanged"
    set_param(project, "power: 2", "power: 7")
    outcome, lines = run(project, "count")
    assert outcome == "ran"
    assert any(line == "count: did 6 of 6 items" for line in lines)
    assert not any("git add" in line for line in lines)
    set_param(project, "power: 7", "power: 2")
    assert run(project, "count")[0] == "restored from DVC's cache"
    assert run(project, "count", force=True)[0] == "ran"


def test_failure_has_the_error_of_the_stage(project: Path) -> None:
    set_param(project, 'fail: ""', "fail: data")
    with pytest.raises(StageFailedError) as caught:
        run(project, "model")
    error = caught.value
    assert str(error) == "model: the input is not valid -> replace it"
    assert (error.exit_code, error.kind, error.transient) == (3, "data", False)
    assert "model: the input is not valid" in error.tail
    set_param(project, "fail: data", "fail: flaky")
    (project / ".runs/failed-once").unlink()
    with pytest.raises(StageFailedError) as caught:
        run(project, "model")
    assert caught.value.transient
    assert run(project, "model")[0] == "ran"


def test_timeout_ends_the_process_group(project: Path) -> None:
    set_param(project, 'fail: ""', "fail: child")
    (project / ".runs").mkdir(exist_ok=True)
    with pytest.raises(StageFailedError, match=r"took longer than 20 s -> raise timeout_s") as caught:
        run(project, "model", timeout_s=20.0)
    assert not caught.value.transient
    assert dvc_project.has_exited(child_of(project))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_their_parent(project: Path, number: signal.Signals) -> None:
    set_param(project, 'fail: ""', "fail: child")
    (project / ".runs").mkdir(exist_ok=True)
    code = "import sys; from pathlib import Path; from flows.dvc_subprocess import run_dvc_stage; "
    code += "run_dvc_stage('model', Path(sys.argv[1]))"
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(project)], cwd=PROJECT, env=dvc_project.environment(), stdout=subprocess.DEVNULL
    )
    child = child_of(project)
    tree = psutil.Process(starter.pid).children(recursive=True)
    assert len(tree) >= 3
    starter.send_signal(number)
    starter.wait()
    assert dvc_project.has_exited(child)
    assert all(dvc_project.has_exited(process.pid) for process in tree)


def test_guard_kills_processes_that_ignore_sigterm(tmp_path: Path) -> None:
    """The command exits at SIGTERM; its child ignores it and is killed after the grace period."""
    stubborn = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    stubborn += "print(os.getpid(), flush=True); time.sleep(600)"
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stubborn!r}])"
    guard = (
        "import sys; sys.path.insert(0, sys.argv[1]); import process_guard; process_guard.GRACE_S = 1.0; "
        "sys.exit(process_guard.main(sys.argv[2:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", guard, str(PROJECT / "flows"), sys.executable, "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.stdin.close()
    assert dvc_project.has_exited(pid)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("tail", "kind", "message"),
    [
        (
            ("ERROR: 'out' is busy, it is being blocked by:", "  (PID 7): dvc repro"),
            "locked",
            "another DVC process uses the same files",
        ),
        (("ERROR: failed to reproduce 'x': failed to run: python x.py, exited with -9",), "resource", "was ended by SIGKILL"),
        (("ERROR: failed to reproduce 'x': failed to run: python x.py, exited with 137",), "resource", "was ended by SIGKILL"),
        (("ERROR: something of DVC's own", "more"), "internal", "something of DVC's own"),
        ((), "internal", "dvc ended with 255"),
    ],
)
def test_errors_from_output(tmp_path: Path, tail: tuple[str, ...], kind: str, message: str) -> None:
    error = load_stage_error(tmp_path, "x", tail, 255)
    assert (error.kind, error.transient) == (kind, False)
    assert message in str(error)


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"stage": "another", "reason": "old", "transient": True})])
def test_error_files_of_other_stages_are_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "error.json").write_text(text)
    error = load_stage_error(tmp_path, "x", ("ERROR: the real one",), 255)
    assert (error.reason, error.transient) == ("the real one", False)


def test_old_error_file_is_ignored(project: Path) -> None:
    (project / "error.json").write_text(json.dumps({"stage": "model", "reason": "old", "transient": True}))
    set_param(project, "pause: 0.0\n  fail", "pause: oops\n  fail")
    with pytest.raises(StageFailedError) as caught:
        run(project, "model")
    assert "old" not in str(caught.value)
    assert not caught.value.transient
    assert os.path.lexists(project / "out/join.txt")
