"""Runs one stage with `dvc --wait-for-lock repro --single-item NAME` as a guarded process group.

Does not import prefect.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline_steps.core.errors import ERROR_FILE, LockedError, ResourceError, StageError, load_error_file

PROCESS_GUARD = Path(__file__).with_name("process_guard.py")
TAIL_LINES = 40
GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""
POLL_S = 1.0

HINTS = ("To track the changes with git", "git add ", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")
"""Hints that DVC prints after every stage. They are dropped: the flow commits the results."""

RAN, RESTORED, UNCHANGED = "ran", "restored from DVC's cache", "unchanged"


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """Outcome of one stage (`ran`, `restored from DVC's cache` or `unchanged`) and its duration in seconds."""

    name: str
    outcome: str
    seconds: float


class StageFailedError(StageError):
    """A stage failed. Reason, kind, exit code and `transient` are the stage's; `tail` holds the last lines of its log."""

    def __init__(self, stage: str, cause: StageError, tail: tuple[str, ...]) -> None:
        super().__init__(f"{stage}: {cause.reason}", cause.action, cause.transient, cause.details)
        self.stage, self.tail = stage, tail
        self.exit_code, self.kind = cause.exit_code, cause.kind


def run_dvc_stage(
    name: str,
    root: Path,
    *,
    force: bool = False,
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = print,
    on_start: Callable[[int], None] = lambda group: None,
) -> StageOutcome:
    """Bring one stage up to date; waits while another DVC process holds the lock.

    The process group is ended before the function returns or raises, also on a signal or a cancellation.

    Args:
        name: stage of `dvc.yaml`.
        root: folder with `dvc.yaml`.
        force: run the stage even if nothing has changed.
        timeout_s: time limit in seconds; None: no limit.
        environment: environment variables in addition to those of this process.
        on_line: called with every line of output.
        on_start: called with the id of the process group.

    Raises:
        StageFailedError: the stage failed or exceeded the time limit.
    """
    (root / ERROR_FILE).unlink(missing_ok=True)
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", *(["--force"] if force else []), name]
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    outcome, started = UNCHANGED, time.monotonic()
    with _process_tree(command, root, {**os.environ, **(environment or {})}) as process:
        on_start(process.pid)
        for line in _lines(process, None if timeout_s is None else started + timeout_s):
            if line is None:
                timeout = ResourceError(f"took longer than {timeout_s:g} s", "raise timeout_s in its meta (dvc.yaml)")
                raise StageFailedError(name, timeout, tuple(tail))
            outcome = _outcome(line) or outcome
            if line.strip().startswith(HINTS):
                continue
            tail.append(line)
            on_line(line)
        code = process.wait()
    if code:
        terminate_process_group(process.pid)
        raise StageFailedError(name, load_stage_error(root, name, tuple(tail), code), tuple(tail))
    return StageOutcome(name, outcome, time.monotonic() - started)


def load_stage_error(root: Path, stage: str, tail: tuple[str, ...], code: int) -> StageError:
    """Error of a failed stage from its `error.json`, else from DVC's output (DVC exits with 255 for every failure)."""
    error = load_error_file(root)
    return _error_from_output(tail, code) if error is None or error.stage not in ("", stage) else error


def _error_from_output(tail: tuple[str, ...], code: int) -> StageError:
    text = "\n".join(tail)
    if "is busy, it is being blocked by" in text or "Unable to acquire lock" in text:
        return LockedError("another DVC process uses the same files", "wait until it ends, or stop it")
    killed = re.search(r"exited with -(\d+)|exited with (1[2-9]\d)\b", text)
    if killed or code < 0 or code > 128:
        number = int(killed[1] or int(killed[2]) - 128) if killed else (-code if code < 0 else code - 128)
        with suppress(ValueError):
            name = signal.Signals(number).name
            return ResourceError(f"was ended by {name}", "check free memory, then run again: finished work is kept")
    errors = [line for line in tail if line.startswith("ERROR")]
    line = (errors or [line for line in tail if line.strip()] or [f"dvc ended with {code}"])[-1 if not errors else 0]
    return StageError(line.removeprefix("ERROR:").strip()[:500], "see the last lines of its log")


def _outcome(line: str) -> str | None:
    if line.startswith("Running stage "):
        return RAN
    if "is cached - skipping run" in line:
        return RESTORED
    return None


@contextmanager
def _process_tree(command: list[str], cwd: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the command in its own process group under the guard; the group is ended at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(PROCESS_GUARD), *command],
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        terminate_process_group(process.pid)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def terminate_process_group(group: int) -> None:
    """Send SIGTERM to a process group, and SIGKILL after at most GRACE_S seconds."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and _group_is_alive(group):
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


def _group_is_alive(group: int) -> bool:
    """Whether the group has members other than zombies and the guard, which exits after its command."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.pid != group and os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _lines(process: subprocess.Popen[bytes], deadline: float | None) -> Iterator[str | None]:
    """Yield lines of output until the process exits; None when the deadline has passed.

    A thread reads, because this thread receives the signals and must not block in a read. Reading stops shortly after the exit
    of the process, even if a grandchild keeps the pipe open.
    """
    lines: queue.Queue[str | None] = queue.Queue()
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe")
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    exited_at: float | None = None
    while True:
        try:
            line = lines.get(timeout=POLL_S)
        except queue.Empty:
            line = ""
        else:
            if line is None:
                return
            yield line
        now = time.monotonic()
        if process.poll() is None:
            if deadline is not None and now > deadline:
                yield None
        else:
            exited_at = exited_at or now
            if lines.empty() and now - exited_at > POLL_S:
                return


def _read(stream: IO[bytes], lines: queue.Queue[str | None]) -> None:
    with suppress(OSError, ValueError):  # the stream may be closed during the read
        for raw in stream:
            for line in raw.decode("utf-8", "replace").replace("\r", "\n").split("\n"):
                if line.strip():
                    lines.put(line.rstrip())
    lines.put(None)
