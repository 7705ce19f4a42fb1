"""`sonify ui`: start MLflow's UI for the project's runs on this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
import sqlite3
import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline_steps.commands.console import handle_errors, layout_of, print_result
from pipeline_steps.core.errors import ConfigError

if TYPE_CHECKING:
    from pipeline_steps.tracking.settings import TrackingSettings


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@handle_errors
def ui(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on the loopback address.")] = 5000,
    host: Annotated[str, typer.Option(help="Loopback address to listen on; others are refused.")] = "127.0.0.1",
    as_json: Annotated[bool, typer.Option("--json", help="Print the address and command as JSON, start nothing.")] = False,
) -> None:
    """Start the MLflow UI on the project's runs (Ctrl+C ends it)."""
    from pipeline_steps.tracking.client.mlflow_client import relocate_artifacts
    from pipeline_steps.tracking.settings import child_environment, mlflow_environment, read_settings, redact

    layout = layout_of(context)
    if not is_loopback(host):
        raise ConfigError(
            f"--host {host} would show runs and files to the network, and this UI has no password",
            "use 127.0.0.1 and a tunnel (ssh -L), or the server of infra/ with authentication",
        )
    settings = read_settings(layout)
    if settings.is_server:
        address = redact(settings.uri)
        print_result({"address": address}, [f"MLFLOW_TRACKING_URI is a server with its own UI: {address}"], as_json)
        return
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", settings.uri, "--host", host, "--port", str(port)]
    command += ["--workers", "1", *(["--default-artifact-root", settings.artifacts] if settings.artifacts else [])]
    shown = [redact(part) for part in command]
    relocate_artifacts(settings)
    address = f"http://{host}:{port}{_runs_page(settings)}"
    print_result({"address": address, "command": shown}, [f"MLflow UI: {address}  (Ctrl+C ends it)"], as_json)
    if as_json:
        return
    refuse_taken(host, port)
    sys.stdout.flush()
    os.chdir(layout.root)
    # This process becomes the UI, so that stopping it stops the UI.
    os.execve(sys.executable, command, child_environment(settings) | mlflow_environment(60))  # noqa: S606 - a fixed argument list


def _runs_page(settings: TrackingSettings) -> str:
    """Page of the experiment's runs in MLflow's view for model training; by default MLflow shows that for language models.

    Empty if the store is no SQLite file or has no experiment yet.
    """
    if settings.is_missing or not settings.uri.startswith("sqlite:///"):
        return ""
    with closing(sqlite3.connect(settings.uri.removeprefix("sqlite:///"))) as database, suppress(sqlite3.OperationalError):
        query = "SELECT experiment_id FROM experiments WHERE name = ?"
        for (number,) in database.execute(query, (settings.experiment,)):
            return f"/#/experiments/{number}/runs?workflowType=machine_learning"
    return ""


def refuse_taken(host: str, port: int) -> None:
    """Raise a ConfigError if a server cannot listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used: {error.strerror}", "choose another with --port"
            ) from error
