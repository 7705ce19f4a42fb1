"""Tests of the workspace lock and of the cleanup after dead processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from flows.workspace_lock import read_record, record_path, recover_dvc_lock, update_lock_record, workspace_lock
from pipeline_steps.core.errors import LockedError

PROJECT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from flows.workspace_lock import workspace_lock
with workspace_lock(Path(sys.argv[1]), {"name": "first", "flow_run_id": "1"}, 0.0):
    print("held", flush=True)
    time.sleep(600)
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=PROJECT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_run_waits_and_is_refused(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    lines: list[str] = []
    try:
        with (
            pytest.raises(LockedError, match=rf"run first \(PID {holder.pid}"),
            workspace_lock(tmp_path, {"name": "b"}, 0.3, lines.append),
        ):
            raise AssertionError("not reached")
        assert len(lines) == 1
        assert lines[0].startswith("waiting for run first")
    finally:
        holder.kill()
        holder.wait()
    with workspace_lock(tmp_path, {"name": "second"}, 5.0) as crashed:
        assert crashed is not None
        assert crashed["name"] == "first", "the record of the crashed run"
        assert (read_record(tmp_path) or {})["name"] == "second"
    assert read_record(tmp_path) is None
    with workspace_lock(tmp_path, {"name": "third"}, 0.0) as crashed:
        assert crashed is None, "the second run ended normally"


def test_processes_of_a_crashed_run_are_killed(tmp_path: Path) -> None:
    folder = tmp_path / "worktree"
    folder.mkdir()
    inside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=folder, start_new_session=True)
    outside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], cwd=tmp_path, start_new_session=True)
    try:
        with workspace_lock(tmp_path, {"name": "a"}, 0.0):
            update_lock_record(tmp_path, group=inside.pid, folder=str(folder))
            record = record_path(tmp_path).read_text()
        record_path(tmp_path).write_text(record)
        with workspace_lock(tmp_path, {"name": "b"}, 0.0):
            assert inside.wait(timeout=10) == -signal.SIGKILL
        record_path(tmp_path).write_text(json.dumps({"group": outside.pid, "folder": str(folder)}))
        with workspace_lock(tmp_path, {"name": "c"}, 0.0):
            assert outside.poll() is None, "a process id that another program has now"
    finally:
        for process in (inside, outside):
            process.kill()
            process.wait()


def write_rwlock(root: Path, text: str) -> Path:
    path = root / ".dvc/tmp/rwlock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert not psutil.pid_exists(process.pid)
    return process.pid


def test_dvc_locks_of_dead_processes_are_removed(tmp_path: Path) -> None:
    assert recover_dvc_lock(tmp_path) == []
    own, dead = os.getpid(), dead_pid()  # this process is alive but not DVC
    locks = {
        "write": {"/p/a": {"pid": dead, "cmd": "dvc repro"}, "/p/b": {"pid": own, "cmd": "dvc repro"}},
        "read": {"/p/c": [{"pid": dead, "cmd": "dvc repro"}]},
    }
    path = write_rwlock(tmp_path, json.dumps(locks))
    assert len(recover_dvc_lock(tmp_path)) == 3
    assert json.loads(path.read_text()) == {"read": {}, "write": {}}


@pytest.mark.parametrize("text", ["", '{"write": {"/p/a": {"pid"', "[]", '{"write": [1]}'])
def test_truncated_lock_file_is_removed(tmp_path: Path, text: str) -> None:
    path = write_rwlock(tmp_path, text)
    assert "truncated" in recover_dvc_lock(tmp_path)[0]
    assert not path.exists()


def test_lock_of_a_running_dvc_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "dvc"
    script.write_text(textwrap.dedent("import time\nprint('up', flush=True)\ntime.sleep(600)\n"))
    running = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    running.stdout.readline()
    try:
        time.sleep(0.1)
        path = write_rwlock(tmp_path, json.dumps({"write": {"/p/a": {"pid": running.pid, "cmd": "dvc repro"}}, "read": {}}))
        before = path.read_text()
        assert recover_dvc_lock(tmp_path) == []
        assert path.read_text() == before
        os.utime(path, (1.0, 1.0))  # a file older than the process: the id was reused
        assert len(recover_dvc_lock(tmp_path)) == 1
    finally:
        running.kill()
        running.wait()
