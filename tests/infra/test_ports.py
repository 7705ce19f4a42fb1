"""Tests of port ownership with a supervisor and the report page."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from infra import services
from infra.topology import HOST, PORTS, REPORTS, ServiceEnvironment, find_program, programs


class OtherServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def supervised() -> Iterator[ServiceEnvironment]:
    """A running supervisor without started programs."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="env-") as folder:  # short enough for a socket
        env = ServiceEnvironment(Path(folder), {**PORTS, "REPORTS_PORT": port})
        for name in ("logs", "tmp", "secrets"):
            (env.folder / name).mkdir()
        services._write_supervisor_config(env)
        command = [str(find_program("supervisord")), "-c", str(env.folder / "supervisord.conf")]
        subprocess.run(command, check=True, cwd=env.folder)
        for _ in range(100):
            if services._is_supervised(env):
                break
            time.sleep(0.1)
        yield env
        services.stop(env)


def test_answer_of_another_process_is_not_healthy(supervised: ServiceEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server on the port of the report page also answers 200."""
    monkeypatch.setattr(services, "PORT_TIMEOUT_S", 0.5)
    reports = next(program for program in programs(supervised) if program.name == REPORTS)
    port = supervised.ports["REPORTS_PORT"]
    with http.server.ThreadingHTTPServer((HOST, port), OtherServer) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        assert services._answers(supervised, reports)
        with pytest.raises(
            services.InfraError, match=rf"reports: port {port} is used by .* \(PID {os.getpid()}, .*REPORTS_PORT="
        ):
            services.start_one(supervised, reports)
        services.supervisor(supervised).supervisor.startProcess(REPORTS, False)  # it exits repeatedly
        assert not services.is_healthy(supervised, reports)
        with pytest.raises(services.InfraError, match="is used by"):
            services.wait_healthy(supervised, replace(reports, startup_timeout_s=1.0))
        services.supervisor(supervised).supervisor.stopProcess(REPORTS)
        other.shutdown()
    services.start_one(supervised, reports)
    assert services.status(supervised)[REPORTS] == ("RUNNING", True)
