"""Who listens on a port: a program's own process tree, or somebody else who must be named."""

from __future__ import annotations

import socket
from contextlib import suppress

import psutil


def is_listening(pid: int, port: int) -> bool:
    """Whether the process or one below it listens on the port. Asked of these processes alone, so it needs no privilege."""
    with suppress(psutil.Error):
        for process in (root := psutil.Process(pid), *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                if port in _ports(process):
                    return True
    return False


def is_taken(host: str, port: int) -> bool:
    """Whether a server could not listen there now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a closed connection leaves is no listener
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def port_owner(port: int) -> str:
    """The process that listens on the port, for people; another user's cannot be seen by everybody."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if port in _ports(process):
                return f"{process.name()} (PID {process.pid}, user {process.username()})"
    return "a process that this user cannot see"


def _ports(process: psutil.Process) -> set[int]:
    return {found.laddr.port for found in process.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
