"""Process guard: ends a process group when its parent dies. `python process_guard.py COMMAND ...`, stdin is a pipe.

The kernel closes the pipe when the parent dies, also after `kill -9`. The guard leads the process group; it then sends SIGTERM
to the group, and SIGKILL after a grace period. It exits with the command's exit code. Standard library only, for a fast start.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL, in which a stage writes its checkpoint and `error.json`."""


def is_last_in_group() -> bool:
    """Whether no other process of this group is alive. Always False without `/proc`, so the full grace period passes."""
    me, found = os.getpid(), False
    for entry in Path("/proc").glob("[0-9]*/stat"):
        if entry.parent.name == str(me):
            continue
        try:
            state, _parent, group = entry.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError, IndexError):
            continue
        found = True
        if int(group) == me and state != "Z":
            return False
    return found


def kill_group_on_parent_exit(stopping: threading.Event) -> None:
    """Wait until the parent's end of the pipe is closed, then end the process group including this process."""
    while os.read(0, 4096):  # not sys.stdin: its lock would be held at the exit of the interpreter
        pass
    stopping.set()
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and not is_last_in_group():
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)


def main(command: list[str]) -> int:
    """Run the command; returns its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):  # the command handles them
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    stopping = threading.Event()
    stopper = threading.Thread(target=kill_group_on_parent_exit, args=(stopping,), daemon=True)
    stopper.start()
    code = child.wait()
    if stopping.is_set():  # the command has exited, but its children may not have
        stopper.join()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
