"""`sonify ui`: MLflow's web page on the project's runs, on this machine alone."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from typing import Annotated

import typer

from pipeline_steps.commands.console import answer, guarded, layout_of
from pipeline_steps.core.errors import ConfigError


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@guarded
def ui(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on the loopback address.")] = 5000,
    host: Annotated[str, typer.Option(help="Loopback address to listen on; others are refused.")] = "127.0.0.1",
    as_json: Annotated[bool, typer.Option("--json", help="Print the address and command as JSON, start nothing.")] = False,
) -> None:
    """Start the MLflow UI on the project's runs (Ctrl+C ends it)."""
    from pipeline_steps.tracking.settings import child_environment, mlflow_environment, read_settings, redact

    layout = layout_of(context)
    if not is_loopback(host):
        raise ConfigError(
            f"--host {host} would show runs and files to the network, and this UI asks for no password",
            "use 127.0.0.1 and a tunnel (ssh -L), or the server of infra/ with authentication",
        )
    settings = read_settings(layout)
    if settings.is_server:
        address = redact(settings.uri)
        answer({"address": address}, [f"MLFLOW_TRACKING_URI is a server with its own UI: {address}"], as_json)
        return
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", settings.uri, "--host", host, "--port", str(port)]
    command += ["--default-artifact-root", settings.artifacts] if settings.artifacts else []
    shown = [redact(part) for part in command]
    answer(
        {"address": f"http://{host}:{port}", "command": shown}, [f"MLflow UI: http://{host}:{port}  (Ctrl+C ends it)"], as_json
    )
    if as_json:
        return
    environment = child_environment(settings) | mlflow_environment(60)
    try:
        code = subprocess.run(command, env=environment, cwd=layout.root, check=False).returncode
    except KeyboardInterrupt:
        return
    if code:
        raise ConfigError(f"mlflow ui ended with code {code}", f"is port {port} taken? choose another with --port")
