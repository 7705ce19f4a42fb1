"""HTTP server with as much of a model hub's protocol as huggingface_hub needs to list and fetch the files of a commit."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline_steps.core.hashing import sha256_file


class HubServer:
    """Serves folders as commits; a context manager. `fetched` is every file that was downloaded.

    Args:
        commits: (hub id, commit) -> folder.
    """

    def __init__(self, commits: Mapping[tuple[str, str], Path]) -> None:
        self.fetched: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[:2] == ["api", "models"] and parts[4:5] in (["revision"], ["tree"]):
                    self.list_files("/".join(parts[2:4]), parts[5], parts[4] == "tree")
                elif parts[2:3] == ["resolve"]:
                    self.send_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
                else:
                    self.reply(404, b"{}", {})

            def list_files(self, model: str, commit: str, as_tree: bool) -> None:
                if (model, commit) not in commits:
                    known = any(name == model for name, _ in commits)
                    code = "RevisionNotFound" if known else "RepoNotFound"
                    self.reply(404, b'{"error": "not found"}', {"X-Error-Code": code})
                    return
                paths = sorted(commits[model, commit].iterdir())
                siblings = [{"rfilename": path.name} for path in paths]
                tree = [
                    {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": sha256_file(path)[:40]}
                    for path in paths
                ]
                answer = tree if as_tree else {"id": model, "sha": commit, "siblings": siblings}
                self.reply(200, json.dumps(answer).encode(), {})

            def send_file(self, model: str, commit: str, name: str) -> None:
                path = commits[model, commit] / name
                if self.command == "GET":
                    outer.fetched.append(name)
                self.reply(200, path.read_bytes(), {"ETag": f'"{sha256_file(path)}"', "X-Repo-Commit": commit})

            def reply(self, status: int, payload: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(payload)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
