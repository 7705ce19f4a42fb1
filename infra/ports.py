"""Listeners on ports: whether a process tree listens, whether a port is free, and which process uses it."""

from __future__ import annotations

import socket
from contextlib import suppress

import psutil


def is_listening(pid: int, port: int) -> bool:
    """Whether the process or one of its children listens on the port. Needs no privilege for the caller's processes."""
    with suppress(psutil.Error):
        for process in (root := psutil.Process(pid), *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                if port in _ports(process):
                    return True
    return False


def is_taken(host: str, port: int) -> bool:
    """Whether a server cannot listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore sockets of closed connections
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def port_owner(port: int) -> str:
    """Description of the process that listens on the port; processes of other users may not be visible."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if port in _ports(process):
                return f"{process.name()} (PID {process.pid}, user {process.username()})"
    return "a process that is not visible to this user"


def _ports(process: psutil.Process) -> set[int]:
    return {found.laddr.port for found in process.net_connections("tcp") if found.status == psutil.CONN_LISTEN}
