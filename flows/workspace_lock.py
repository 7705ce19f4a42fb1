"""One flow run at a time in a workspace, and clean hands after one that died.

The lock is the kernel's (`flock` on `.runs/flow.lock`): it is free the moment its holder is dead, by `kill -9` too. Who holds
it stands in `.runs/flow.json`; a record that is still there when the lock is free is that of a run that died.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from pipeline_steps.core.atomic import write_json
from pipeline_steps.core.errors import LockedError

POLL_S = 2.0


def record_path(project: Path) -> Path:
    """Where the holder of the lock is named."""
    return project / ".runs/flow.json"


def read_record(project: Path) -> dict[str, Any] | None:
    """The holder's record, or that of a run that died; None when there is none (or it is not readable)."""
    try:
        record = json.loads(record_path(project).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


@contextmanager
def workspace_lock(
    project: Path, who: Mapping[str, str], wait_s: float, say: Callable[[str], None] = print
) -> Iterator[dict[str, Any] | None]:
    """Hold the workspace; yields the record of a run that died holding it, or None.

    Args:
        project: the project folder.
        who: `flow_run_id`, `name` of the run.
        wait_s: how long to wait for another run to end.
        say: gets one line when waiting begins.

    Raises:
        LockedError: another run still holds it after `wait_s`.
    """
    (project / ".runs").mkdir(exist_ok=True)
    lock = FileLock(project / ".runs/flow.lock")
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            holder = _describe_holder(read_record(project))
            if time.monotonic() >= deadline:
                raise LockedError(
                    f"{holder} is at work in {project}", "start this one when it has ended, or cancel it"
                ) from None
            if not told:
                say(f"waiting for {holder} to end")
                told = True
            time.sleep(min(POLL_S, max(0.05, deadline - time.monotonic())))
    try:
        left = read_record(project)
        if left is not None:
            _kill_orphans(left)
        mine = {**who, "pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        write_json(record_path(project), mine)
        yield left
    finally:
        record_path(project).unlink(missing_ok=True)
        lock.release()


def update_lock_record(project: Path, **values: Any) -> None:
    """Add to the record of the run that holds the lock: the process group at work, the folder it works in."""
    write_json(record_path(project), {**(read_record(project) or {}), **values})


def _describe_holder(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "another run"
    return f"run {record.get('name', '?')} (PID {record.get('pid', '?')} on {record.get('host', '?')})"


def _kill_orphans(record: Mapping[str, Any]) -> None:
    """Kill what a dead run left running: processes of its group that work in its folder (both, since numbers are reused)."""
    group, folder = record.get("group"), record.get("folder")
    if not isinstance(group, int) or not isinstance(folder, str):
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            cwd = Path(process.cwd())
            if os.getpgid(process.pid) == group and (cwd == Path(folder) or Path(folder) in cwd.parents):
                process.kill()


def recover_dvc_lock(root: Path) -> list[str]:
    """Remove from DVC's `rwlock` what dead processes left; returns one line for each thing removed.

    DVC itself drops entries of process numbers that do not exist. It stops for good at a file cut short by a kill, and at a
    number that another program has since been given: an entry is believed only when its process is a dvc and older than
    the lock file's last change.
    """
    path = root / ".dvc/tmp/rwlock"
    if not path.is_file():
        return []
    with (root / ".dvc/tmp/rwlock.lock").open("a+") as guard:  # the guard DVC takes around every change of the file
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            entries = {(mode, name): held[mode][name] for mode in ("read", "write") for name in held.get(mode, {})}
        except (ValueError, AttributeError, TypeError, LookupError):
            path.unlink()
            return [f"{path} was cut short by a crash: removed"]
        changed, removed = path.stat().st_mtime, []
        for (mode, name), infos in entries.items():
            alive = [info for info in (infos if isinstance(infos, list) else [infos]) if _is_dvc(info, changed)]
            dead = [info for info in (infos if isinstance(infos, list) else [infos]) if info not in alive]
            removed += [f"lock on {name} left by dead process {info.get('pid')}: removed" for info in dead]
            if not alive:
                del held[mode][name]
            elif isinstance(infos, list):
                held[mode][name] = alive
        if removed:
            write_json(path, held)
        return removed


def _is_dvc(info: Any, changed: float) -> bool:
    try:
        process = psutil.Process(int(info["pid"]))
        return process.create_time() <= changed + 1 and any("dvc" in part for part in [process.name(), *process.cmdline()])
    except (psutil.NoSuchProcess, psutil.ZombieProcess, KeyError, TypeError, ValueError):
        return False
    except psutil.AccessDenied:
        return True
