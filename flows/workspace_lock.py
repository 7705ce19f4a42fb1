"""Workspace lock: one flow run at a time, with cleanup after a crashed run.

The kernel holds the lock (`flock` on `.runs/flow.lock`) and releases it when the holder dies, also after `kill -9`. The holder
is recorded in `.runs/flow.json`. A record that exists while the lock is free belongs to a crashed run.
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
    """File with the record of the lock's holder."""
    return project / ".runs/flow.json"


def read_record(project: Path) -> dict[str, Any] | None:
    """Record of the holder or of a crashed run; None if there is no readable record."""
    try:
        record = json.loads(record_path(project).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


@contextmanager
def workspace_lock(
    project: Path, holder: Mapping[str, str], wait_s: float, log: Callable[[str], None] = print
) -> Iterator[dict[str, Any] | None]:
    """Hold the workspace lock; yields the record of a crashed run that held it before, else None.

    Args:
        project: project folder.
        holder: `flow_run_id` and `name` of the run.
        wait_s: longest wait for another run in seconds.
        log: called with one line when the wait begins.

    Raises:
        LockedError: another run still holds the lock after `wait_s`.
    """
    (project / ".runs").mkdir(exist_ok=True)
    lock = FileLock(project / ".runs/flow.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if wait_s > 0:
            log(f"waiting for {_describe_holder(read_record(project))} to end")
        try:
            lock.acquire(timeout=wait_s, poll_interval=min(POLL_S, wait_s))
        except Timeout:
            other = _describe_holder(read_record(project))
            raise LockedError(f"{other} uses the workspace {project}", "wait until it ends, or cancel it") from None
    try:
        crashed = read_record(project)
        if crashed is not None:
            _kill_leftover_processes(crashed)
        record = {**holder, "pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        write_json(record_path(project), record)
        yield crashed
    finally:
        record_path(project).unlink(missing_ok=True)
        lock.release()


def update_lock_record(project: Path, **values: Any) -> None:
    """Add values to the holder's record: the running process group and its folder."""
    write_json(record_path(project), {**(read_record(project) or {}), **values})


def _describe_holder(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "another run"
    return f"run {record.get('name', '?')} (PID {record.get('pid', '?')} on {record.get('host', '?')})"


def _kill_leftover_processes(record: Mapping[str, Any]) -> None:
    """Kill processes of a crashed run. Both group and folder must match, because process ids are reused."""
    group, folder = record.get("group"), record.get("folder")
    if not isinstance(group, int) or not isinstance(folder, str):
        return
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            cwd = Path(process.cwd())
            if os.getpgid(process.pid) == group and (cwd == Path(folder) or Path(folder) in cwd.parents):
                process.kill()


def recover_dvc_lock(root: Path) -> list[str]:
    """Remove entries of dead processes from DVC's `rwlock`; returns one line for each removal.

    DVC drops entries of process ids that do not exist. It fails on a file truncated by a kill, and on a process id that another
    program has now. An entry is therefore only kept if its process is DVC and older than the last change of the file.
    """
    path = root / ".dvc/tmp/rwlock"
    if not path.is_file():
        return []
    with (root / ".dvc/tmp/rwlock.lock").open("a+") as guard:  # the lock that DVC takes around every change of the file
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            locks = json.loads(path.read_text(encoding="utf-8"))
            entries = {(mode, name): locks[mode][name] for mode in ("read", "write") for name in locks.get(mode, {})}
        except (ValueError, AttributeError, TypeError, LookupError):
            path.unlink()
            return [f"{path} was truncated by a crash: removed"]
        changed, removed = path.stat().st_mtime, []
        for (mode, name), value in entries.items():
            holders = value if isinstance(value, list) else [value]
            alive = [info for info in holders if _is_dvc(info, changed)]
            removed += [f"lock on {name} of dead process {info.get('pid')}: removed" for info in holders if info not in alive]
            if not alive:
                del locks[mode][name]
            elif isinstance(value, list):
                locks[mode][name] = alive
        if removed:
            write_json(path, locks)
        return removed


def _is_dvc(info: Any, changed: float) -> bool:
    try:
        process = psutil.Process(int(info["pid"]))
        return process.create_time() <= changed + 1 and any("dvc" in part for part in [process.name(), *process.cmdline()])
    except (psutil.NoSuchProcess, psutil.ZombieProcess, KeyError, TypeError, ValueError):
        return False
    except psutil.AccessDenied:
        return True
