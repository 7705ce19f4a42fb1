"""HTTP server for reports: `/runs/NAME/` and `/current/`. Read-only, no directory listings, loopback only."""

from __future__ import annotations

import http.server
import threading
from functools import partial
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flows.run_summary import REPORTS
from pipeline_steps.core.project_paths import ProjectPaths

HOST = "127.0.0.1"
LOCAL_NAMES = {"127.0.0.1", "localhost", "[::1]"}


class ReportHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files of two folders of the project."""

    def __init__(self, *arguments: object, project: Path) -> None:
        self._folders = {"runs": project / REPORTS, "current": ProjectPaths(project).reports}
        super().__init__(*arguments, directory=str(project))  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        """File of a URL; a path outside the folders becomes a file that does not exist."""
        parts = [part for part in unquote(urlsplit(path).path).split("/") if part]
        folder = self._folders.get(parts[0]) if parts else None
        if folder is None:
            return "/nonexistent"
        target = folder.joinpath(*parts[1:])
        return str(target) if target.resolve().is_relative_to(folder.resolve()) else "/nonexistent"

    def list_directory(self, path: object) -> None:
        """Refuse directory listings."""
        self.send_error(HTTPStatus.NOT_FOUND)

    def parse_request(self) -> bool:
        """Refuse requests for other host names, so that a foreign page cannot read reports through the browser."""
        if not super().parse_request():
            return False
        name = self.headers.get("Host", "").rsplit(":", 1)[0]
        if name not in LOCAL_NAMES:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return False
        return True

    def end_headers(self) -> None:
        """Add headers against content sniffing and caching."""
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def serve_reports(project: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Start the server in a thread; `shutdown()` stops it. Port 0 selects a free port.

    Raises:
        OSError: the port is in use.
    """
    server = http.server.ThreadingHTTPServer((HOST, port), partial(ReportHandler, project=project))
    threading.Thread(target=server.serve_forever, daemon=True, name="reports").start()
    return server
