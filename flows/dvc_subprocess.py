"""One stage as a process tree: `dvc --wait-for-lock repro --single-item NAME` on a leash; its lines, its failure.

No prefect here: the same code runs without a server.
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

LEASH = Path(__file__).with_name("process_guard.py")
TAIL_LINES = 40
GRACE_S = 10.0
"""Seconds a process tree has between SIGTERM and SIGKILL."""
TICK_S = 1.0

HINTS = ("To track the changes with git", "git add ", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")
"""What DVC tells a person after every stage; publishing is the flow's business."""

RAN, RESTORED, UNCHANGED = "ran", "restored from DVC's cache", "unchanged"


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What became of one stage: `ran`, `restored from DVC's cache` or `unchanged`, and after how many seconds."""

    name: str
    outcome: str
    seconds: float


class StageFailedError(StageError):
    """A stage that failed: its own one line, kind, exit code and whether it is transient, with the last lines of its log."""

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
    """Bring one stage up to date, waiting for DVC's lock if another DVC plans or commits.

    Args:
        name: stage of `dvc.yaml`.
        root: the folder that holds it.
        force: run it even when nothing has changed.
        timeout_s: after that the whole process tree is ended.
        environment: added to this process' own.
        on_line: gets every line of output as it comes.
        on_start: gets the id of the process group.

    Raises:
        StageFailedError: the stage failed, or took too long. Whatever else ends the wait (a signal, a cancellation) ends the
            process tree first.
    """
    (root / ERROR_FILE).unlink(missing_ok=True)
    # No terminal behind the pipe: DVC's progress bars would be thousands of lines.
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", *(["--force"] if force else []), name]
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    outcome, started = UNCHANGED, time.monotonic()
    with _process_tree(command, root, {**os.environ, **(environment or {})}) as process:
        on_start(process.pid)
        for line in _lines(process, None if timeout_s is None else started + timeout_s):
            if line is None:
                slow = ResourceError(f"took longer than {timeout_s:g} s", "raise timeout_s in its meta (dvc.yaml)")
                raise StageFailedError(name, slow, tuple(tail))
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
    """Why a stage failed: what it wrote to `error.json`, else what DVC's output says (DVC turns every exit code into 255)."""
    error = load_error_file(root)
    return _guess(tail, code) if error is None or error.stage not in ("", stage) else error


def _guess(tail: tuple[str, ...], code: int) -> StageError:
    text = "\n".join(tail)
    if "is busy, it is being blocked by" in text or "Unable to acquire lock" in text:
        return LockedError("another dvc is at work on the same files", "wait for it, or stop it")
    killed = re.search(r"exited with -(\d+)|exited with (1[2-9]\d)\b", text)
    if killed or code < 0 or code > 128:
        number = int(killed[1] or int(killed[2]) - 128) if killed else (-code if code < 0 else code - 128)
        with suppress(ValueError):
            name = signal.Signals(number).name
            return ResourceError(f"was ended by {name}", "if nobody did that, memory ran out; run again: what is done is kept")
    errors = [line for line in tail if line.startswith("ERROR")]
    said = (errors or [line for line in tail if line.strip()] or [f"dvc ended with {code}"])[-1 if not errors else 0]
    return StageError(said.removeprefix("ERROR:").strip()[:500], "see the last lines of its log")


def _outcome(line: str) -> str | None:
    if line.startswith("Running stage "):
        return RAN
    if "is cached - skipping run" in line:
        return RESTORED
    return None


@contextmanager
def _process_tree(command: list[str], cwd: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the command in its own process group, on a leash; leaving the block ends whatever of the group is still there."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(LEASH), *command],
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


def terminate_process_group(group: int, grace_s: float = GRACE_S) -> None:
    """SIGTERM to a process group, SIGKILL to what of it is left after `grace_s`."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and _group_is_alive(group):
            time.sleep(0.05)
        os.killpg(group, signal.SIGKILL)


def _group_is_alive(group: int) -> bool:
    """Whether the group has members besides zombies and the leash, which ends when its command has."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if process.pid != group and os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _lines(process: subprocess.Popen[bytes], deadline: float | None) -> Iterator[str | None]:
    """Lines of output until the process ends; None when the deadline has passed.

    A thread reads, so that this one, which gets the signals, is never stuck in a read. Output that a stray grandchild keeps
    open does not hold it up: once the process has ended, what has been read is all.
    """
    found: queue.Queue[str | None] = queue.Queue()
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe")
    threading.Thread(target=_read, args=(process.stdout, found), daemon=True).start()
    ended_at: float | None = None
    while True:
        try:
            line = found.get(timeout=TICK_S)
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
            ended_at = ended_at or now
            if found.empty() and now - ended_at > TICK_S:
                return


def _read(stream: IO[bytes], found: queue.Queue[str | None]) -> None:
    with suppress(OSError, ValueError):  # closed under the reader when the wait is given up
        for raw in stream:
            for line in raw.decode("utf-8", "replace").replace("\r", "\n").split("\n"):
                if line.strip():
                    found.put(line.rstrip())
    found.put(None)
