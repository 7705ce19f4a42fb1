"""The services on free ports with a small project, started once for a test module and stopped whatever happens."""

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
    """A free port for each service; the object store gets eight in a row."""
    with ExitStack() as held:
        taken = {}
        for name in PORTS:
            taken[name] = free_row(8, held) if name == "S3_PORT" else free_row(1, held)
        return taken


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


def new_place(folder: Path, project: Path) -> ServiceEnvironment:
    """Services on ports that are free now."""
    # A heartbeat every 30 s is Prefect's smallest; a loaded machine takes its time to upload.
    extra = {
        "SONIFY_TRACKING": "on",
        "SONIFY_TRACKING_DEADLINE": "150",
        "OMP_NUM_THREADS": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }
    return ServiceEnvironment(folder, free_ports(), project, extra)


@pytest.fixture(scope="module")
def services_folder() -> Iterator[Path]:
    """A short path that another user may pass: PostgreSQL does not run as root."""
    folder = Path(tempfile.mkdtemp(prefix="sonify-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=False)


@pytest.fixture(scope="module")
def env(services_folder: Path) -> Iterator[ServiceEnvironment]:
    """Everything running, flows deployed, nothing run yet."""
    if shutil.which("git") is None or find_program("supervisord") is None or find_program("weed") is None:
        pytest.skip("needs git and the extra `services`")
    if find_postgres() is None:
        pytest.skip("needs a PostgreSQL that its user can reach (root: not below a private folder)")
    project = build(services_folder / "project")
    made = new_place(services_folder / "services", project)
    try:
        services.start(made)
        yield made
    finally:
        services.stop(made)
