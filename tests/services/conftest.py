"""Fixtures: the services on free ports with a small project, started once per test module."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from infra import services
from infra.topology import PORTS, ServiceEnvironment, find_postgres, find_program
from tests.services.project import build


def free_ports() -> dict[str, int]:
    """A free port for each service, and eight consecutive ports for the object store."""
    with ExitStack() as held:
        ports = {}
        for name in PORTS:
            ports[name] = free_row(8, held) if name == "S3_PORT" else free_row(1, held)
        return ports


def free_row(length: int, held: ExitStack) -> int:
    for _ in range(200):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
        try:
            with ExitStack() as row:
                for port in range(first, first + length):
                    row.enter_context(socket.socket()).bind(("127.0.0.1", port))
                held.push(row.pop_all())
            return first
        except (OSError, OverflowError):
            continue
    raise AssertionError(f"no {length} free ports in a row")


def new_environment(folder: Path, project: Path) -> ServiceEnvironment:
    """Environment of services on free ports."""
    # A loaded machine needs a longer deadline for uploads.
    extra = {
        "SONIFY_TRACKING": "on",
        "SONIFY_TRACKING_DEADLINE": "150",
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }
    return ServiceEnvironment(folder, free_ports(), project, extra)


@pytest.fixture(scope="module")
def services_folder() -> Iterator[Path]:
    """A short path that other users can access, because PostgreSQL does not run as root."""
    folder = Path(tempfile.mkdtemp(prefix="sonify-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=False)


@pytest.fixture(scope="module")
def env(services_folder: Path) -> Iterator[ServiceEnvironment]:
    """Running services with deployed flows; no flow has run."""
    if shutil.which("git") is None or find_program("supervisord") is None or find_program("weed") is None:
        pytest.skip("needs git and the extra `services`")
    if find_postgres() is None:
        pytest.skip("needs a PostgreSQL that its user can access")
    project = build(services_folder / "project")
    environment = new_environment(services_folder / "services", project)
    try:
        services.start(environment)
        yield environment
    finally:
        services.stop(environment)
