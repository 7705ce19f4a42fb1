"""Serves all flows on this machine: deployments with their schedule, Prefect's UI and reports. `python -m flows.serve`

Uses the server of PREFECT_API_URL, or starts a server on 127.0.0.1:4200. Ctrl+C stops everything.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from flows.dvc_subprocess import PROCESS_GUARD, terminate_process_group
from flows.git_worktree import find_project
from pipeline_steps.core.errors import ConfigError, ServiceError, StageError

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

    from prefect.deployments.runner import RunnerDeployment

HOST = "127.0.0.1"
SERVER_START_S = 180.0
NIGHTLY_CRON = "0 2 * * *"
MAX_CONCURRENT_RUNS = 4
"""Flow runs at the same time. Only one of them runs stages (workspace lock); promotions can run beside it."""


def prepare_environment(project: Path) -> None:
    """Set environment variables for Prefect, before its import; variables that are set stay unchanged."""
    defaults = {
        "PREFECT_HOME": str(project / ".runs/prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "SONIFY_PROJECT": str(project),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def time_zone() -> str:
    """IANA name of the time zone of schedules: TZ if it holds one, else UTC.

    TZ may also hold a POSIX rule (`CET-1CEST,M3.5.0,M10.5.0/3`) or a file (`:/etc/localtime`). Schedules need a name.
    """
    stated = os.environ.get("TZ", "").removeprefix(":")
    name = os.path.realpath(stated).partition("/zoneinfo/")[2] if stated.startswith("/") else stated
    try:
        return ZoneInfo(name).key if name else "UTC"
    except (ValueError, OSError, KeyError):  # ZoneInfoNotFoundError is a KeyError
        print(f"flows.serve: TZ={os.environ['TZ']} is not an IANA name; schedules use UTC", file=sys.stderr)
        return "UTC"


def deployments(project: Path, schedule: bool = True) -> list[RunnerDeployment]:
    """All deployments; a deployment has one run at a time, further runs wait in the queue."""
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron

    from flows.pipeline import nightly, refresh_data, reproduce, train_and_evaluate
    from flows.promote import promote

    def deploy(flow: Any, tags: list[str], cron: str = "") -> RunnerDeployment:
        module = Path(sys.modules[flow.__module__].__file__ or "").name
        return RunnerDeployment.from_entrypoint(
            f"flows/{module}:{flow.__name__}",
            name=flow.name,
            description=flow.description,
            tags=["seeing-sound", *tags],
            schedule=Cron(cron, timezone=time_zone()) if cron and schedule else None,
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            enforce_parameter_schema=True,
        )

    by_hand = [deploy(flow, ["workspace"]) for flow in (reproduce, refresh_data, train_and_evaluate)]
    return [*by_hand, deploy(promote, ["decision"]), deploy(nightly, ["workspace"], NIGHTLY_CRON)]


@contextmanager
def prefect_server(project: Path, port: int) -> Iterator[str]:
    """Yield the address of the API: PREFECT_API_URL, or a server that is started here and stopped at the end.

    Raises:
        ServiceError: the API does not answer.
    """
    configured = os.environ.get("PREFECT_API_URL", "")
    if configured:
        _wait_for_api(configured, 10.0)
        yield configured
        return
    api = f"http://{HOST}:{port}/api"
    os.environ["PREFECT_API_URL"] = api
    if _answers(api):
        yield api
        return
    log = project / ".runs/prefect-server.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]
    with log.open("ab") as output:
        server = subprocess.Popen(
            [sys.executable, "-I", str(PROCESS_GUARD), *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait_for_api(api, SERVER_START_S, server, log)
        yield api
    finally:
        terminate_process_group(server.pid)
        server.wait()


def _wait_for_api(api: str, seconds: float, server: subprocess.Popen[bytes] | None = None, log: Path | None = None) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (server is None or server.poll() is None):
        if _answers(api):
            return
        time.sleep(0.5)
    raise ServiceError(
        f"Prefect's API at {api} does not answer",
        f"see {log}" if log else "start the server, or run without Prefect: dvc repro",
    )


def _answers(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as answer:  # noqa: S310 - our own address
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, default=4200, help="port of Prefect's server and UI, if one is started")
    parser.add_argument("--reports-port", type=int, help="port of the reports; default: 4201, or that of SONIFY_REPORTS_URL")
    parser.add_argument("--no-schedule", action="store_true", help="do not schedule the nightly run")
    options = parser.parse_args(arguments)
    try:
        project = find_project()
        prepare_environment(project)
        os.chdir(project)
        with prefect_server(project, options.port) as api:
            _serve(project, api, not options.no_schedule, options.reports_port)
        return 0
    except StageError as error:
        print(f"flows.serve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def start_report_server(project: Path, port: int | None) -> ThreadingHTTPServer:
    """Start the report server on a port; None selects that of SONIFY_REPORTS_URL, or a free one if it is in use.

    Raises:
        ConfigError: a port was given and cannot be used.
    """
    from flows.report_server import serve_reports
    from flows.run_summary import report_base

    try:
        return serve_reports(project, (urlsplit(report_base()).port or 80) if port is None else port)
    except OSError as error:
        if port is not None:
            raise ConfigError(f"port {port} cannot be used: {error.strerror}", "choose another with --reports-port") from error
        return serve_reports(project, 0)


def _serve(project: Path, api: str, schedule: bool, reports_port: int | None) -> None:
    from prefect import serve

    from flows import automations
    from flows.crashed_runs import mark_dead_runs_crashed
    from flows.run_summary import report_base

    automations.ensure_automation()
    mark_dead_runs_crashed(project)
    reports = start_report_server(project, reports_port)
    os.environ["SONIFY_REPORTS_URL"] = f"http://{HOST}:{reports.server_address[1]}"  # inherited by the processes of runs
    print(f"UI: {api.removesuffix('/api')}   reports: {report_base()}", flush=True)
    serve(*deployments(project, schedule), pause_on_shutdown=False, limit=MAX_CONCURRENT_RUNS)


if __name__ == "__main__":
    sys.exit(main())
