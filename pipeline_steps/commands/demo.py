"""`sonify demo`: page that draws images from sounds and finds sounds for images."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from typing import Annotated

import typer

from pipeline_steps.commands.console import handle_errors, layout_of
from pipeline_steps.commands.ui import is_loopback, refuse_taken
from pipeline_steps.core.errors import ConfigError, StageError
from pipeline_steps.core.escape import escape_terminal

LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
"""Host names of requests that the page answers. Others may come from a foreign page through the browser (DNS rebinding)."""


@handle_errors
def demo(
    context: typer.Context,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to listen on; the page has no password.")] = "127.0.0.1",
    model: Annotated[
        str | None,
        typer.Option(help="Exported folder, or version, alias or run in the registry; default: the project's model."),
    ] = None,
) -> None:
    """Start a page that draws images from sounds and finds sounds for images (Ctrl+C ends it)."""
    layout = layout_of(context)
    if find_spec("gradio") is None:
        raise ConfigError("the page needs gradio, which is not installed", "pip install -c constraints.txt -e '.[demo]'")
    refuse_taken(host, port)
    with tempfile.TemporaryDirectory(prefix="sonify-demo-") as folder:
        # Gradio reads its variables when it is imported.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        import uvicorn

        from pipeline_steps.commands.demo_backend import DemoBackend
        from pipeline_steps.commands.demo_page import build_app, warm_up

        with DemoBackend(layout, model) as backend:
            try:
                warm_up(backend, model)
            except StageError as error:
                if model is not None:
                    raise
                print(f"note: {escape_terminal(str(error))}; the page draws as soon as this is done", flush=True)
            if not is_loopback(host):
                print(f"note: the page has no password, and everyone who reaches {host}:{port} can use it", flush=True)
            print(f"Demo page: http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}  (Ctrl+C ends it)", flush=True)  # noqa: S104
            page = build_app(backend, (*LOCAL_NAMES, host))
            # Open pages hold connections, which would keep the server from ending.
            uvicorn.run(page, host=host.strip("[]"), port=port, log_level="warning", timeout_graceful_shutdown=2)
