"""A real Ray cluster of two raylets on this machine, as two `ray start --block` process trees, and drivers on it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

PROJECT = Path(__file__).resolve().parents[2]
STORE = str(100 * 2**20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """Of nodes and drivers: no telemetry, a token that nobody else knows, first-party code from this checkout."""
    fixed = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64, "RAY_worker_niceness": "0"}
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **fixed, "PYTHONPATH": path, **more}


def wait_for(what: Callable[[], object], seconds: float = 200.0, every: float = 0.05) -> None:
    """Poll until `what` is true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it started, as when a machine is lost."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    process.wait()


@dataclass
class Cluster:
    """Head and a second node, one processor each: two actors, one a node."""

    address: str
    folder: Path
    nodes: list[subprocess.Popen[bytes]]

    def start(self, *arguments: str) -> None:
        """One more node. Ray gives its processes a fixed time to start, too short on a busy machine: so three times."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        command += [f"--object-store-memory={STORE}", "--disable-usage-stats", "--include-log-monitor=false", *arguments]
        before = self.raylets()
        for attempt in range(3):
            with (self.folder / f"node{len(self.nodes)}.log").open("wb") as log:
                node = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
            self.nodes.append(node)
            wait_for(self.last_started)
            if node.poll() is None and self.raylets() > before:
                return
            assert attempt < 2, self.said()[-2000:]
            kill_tree(self.nodes.pop())

    def last_started(self) -> bool:
        """Whether the last node runs, or has given up."""
        return "Ray runtime started" in self.said() or self.nodes[-1].poll() is not None

    def said(self) -> str:
        """What the last node wrote."""
        return (self.folder / f"node{len(self.nodes) - 1}.log").read_text()

    def raylets(self) -> int:
        """Raylets that run below our nodes."""
        return sum(name == "raylet" for node in self.nodes for name in names_below(node))


def names_below(process: subprocess.Popen[bytes]) -> list[str]:
    """Names of the processes that it started and that run."""
    try:
        return [child.name() for child in psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def two_raylets(lock: Path) -> Iterator[Cluster]:
    """The cluster, alone on this machine: test workers take turns."""
    with FileLock(lock):
        folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: the sockets' paths may have 107 characters
        port = free_port()
        cluster = Cluster(f"127.0.0.1:{port}", folder, [])
        try:
            cluster.start("--head", f"--port={port}", "--include-dashboard=false", "--no-monitor", f"--temp-dir={folder}")
            cluster.start(f"--address={cluster.address}")
            yield cluster
        finally:
            for node in reversed(cluster.nodes):
                kill_tree(node)
            shutil.rmtree(folder, ignore_errors=True)


def driver(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """A Python process in `folder`, its answer on standard output."""
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str], seconds: float = 300.0) -> str:
    """Standard output of a driver that ends well."""
    try:
        answer, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, errors[-3000:]
    return answer
