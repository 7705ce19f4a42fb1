"""A child that never outlives its starter, not even after `kill -9`: `python leash.py COMMAND ...`, stdin a pipe from it.

The kernel closes the pipe when the starter dies, however it dies; then the whole process group (this process leads it) gets
SIGTERM, and SIGKILL a little later. Exits with the command's code. Standard library only: it starts in milliseconds.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL: enough for a stage to write its checkpoint marker and `error.json`."""


def is_last_in_group() -> bool:
    """Whether nobody else of this process group is alive (Linux; elsewhere False, and the full grace is waited)."""
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
    """Wait until the starter's end of the pipe is closed, then end the group, this process included."""
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    stopping.set()
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and not is_last_in_group():
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)


def main(command: list[str]) -> int:
    """Run the command on the leash."""
    for number in (signal.SIGTERM, signal.SIGINT):  # meant for the command; it decides when to end
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    stopping = threading.Event()
    stopper = threading.Thread(target=kill_group_on_parent_exit, args=(stopping,), daemon=True)
    stopper.start()
    code = child.wait()
    if stopping.is_set():  # the command is gone, but perhaps not what it had started
        stopper.join()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
