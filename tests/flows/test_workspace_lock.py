"""One run at a time; what dead processes leave is cleared, what living ones hold is not."""

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


def test_two_at_once(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    said: list[str] = []
    try:
        with (
            pytest.raises(LockedError, match=rf"run first \(PID {holder.pid}"),
            workspace_lock(tmp_path, {"name": "b"}, 0.3, said.append),
        ):
            raise AssertionError("not reached")
        assert len(said) == 1
        assert said[0].startswith("waiting for run first")
    finally:
        holder.kill()
        holder.wait()
    with workspace_lock(tmp_path, {"name": "second"}, 5.0) as left:
        assert left is not None
        assert left["name"] == "first", "the record of the run that died is handed over"
        assert (read_record(tmp_path) or {})["name"] == "second"
    assert read_record(tmp_path) is None
    with workspace_lock(tmp_path, {"name": "third"}, 0.0) as left:
        assert left is None, "the second ended in good order"


def test_survivors_of_a_dead_run_are_ended(tmp_path: Path) -> None:
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
            assert outside.poll() is None, "a number that was given to somebody else"
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
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not psutil.pid_exists(gone.pid)
    return gone.pid


def test_dvc_lock_of_dead_processes(tmp_path: Path) -> None:
    assert recover_dvc_lock(tmp_path) == []
    mine, dead = os.getpid(), dead_pid()  # this process is alive, and no dvc
    held = {
        "write": {"/p/a": {"pid": dead, "cmd": "dvc repro"}, "/p/b": {"pid": mine, "cmd": "dvc repro"}},
        "read": {"/p/c": [{"pid": dead, "cmd": "dvc repro"}]},
    }
    path = write_rwlock(tmp_path, json.dumps(held))
    assert len(recover_dvc_lock(tmp_path)) == 3
    assert json.loads(path.read_text()) == {"read": {}, "write": {}}


@pytest.mark.parametrize("text", ["", '{"write": {"/p/a": {"pid"', "[]", '{"write": [1]}'])
def test_a_lock_file_cut_short(tmp_path: Path, text: str) -> None:
    path = write_rwlock(tmp_path, text)
    assert "cut short" in recover_dvc_lock(tmp_path)[0]
    assert not path.exists()


def test_a_living_dvc_keeps_its_lock(tmp_path: Path) -> None:
    script = tmp_path / "dvc"
    script.write_text(textwrap.dedent("import time\nprint('up', flush=True)\ntime.sleep(600)\n"))
    living = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert living.stdout is not None
    living.stdout.readline()
    try:
        time.sleep(0.1)
        path = write_rwlock(tmp_path, json.dumps({"write": {"/p/a": {"pid": living.pid, "cmd": "dvc repro"}}, "read": {}}))
        before = path.read_text()
        assert recover_dvc_lock(tmp_path) == []
        assert path.read_text() == before
        os.utime(path, (1.0, 1.0))  # a file older than the process: the number was used again
        assert len(recover_dvc_lock(tmp_path)) == 1
    finally:
        living.kill()
        living.wait()
