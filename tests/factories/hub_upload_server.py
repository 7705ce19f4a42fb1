"""HTTP server with as much of a model hub's protocol as huggingface_hub needs to create a repository and upload a commit."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_test"


class HubUploadServer:
    """A context manager. Small files are sent in the commit, as the hub asks for text files.

    Attributes:
        repositories: id -> whether it is private; `public` ones may be put there before.
        files: repository -> path -> bytes of the uploaded commit.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.kinds: dict[str, str] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                parts = self.path.split("?")[0].strip("/").split("/")
                name = "/".join(parts[2:4])
                if parts[:1] == ["api"] and name in outer.repositories:
                    self.reply(200, {"id": name, "private": outer.repositories[name], "siblings": [], "sha": "0" * 40})
                else:
                    self.reply(404, {"error": "not found"})

            def do_POST(self) -> None:
                payload = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "validate-yaml" not in self.path:
                    self.reply(401, {"error": "Invalid username or password."})
                    return
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[1:] == ["repos", "create"]:
                    self.create(json.loads(payload))
                elif parts[4:5] == ["preupload"]:
                    paths = [file["path"] for file in json.loads(payload)["files"]]
                    answer = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
                    self.reply(200, {"files": answer})
                elif parts[4:5] == ["commit"]:
                    self.commit("/".join(parts[2:4]), payload)
                else:
                    self.reply(200, {"errors": [], "warnings": []})

            def create(self, request: dict[str, Any]) -> None:
                name = f"{request.get('organization') or 'me'}/{request['name']}"
                if name in outer.repositories:
                    self.reply(409, {"error": "You already created this repo", "url": f"{outer.url}/{name}"})
                    return
                private = bool(request.get("private")) or request.get("visibility") == "private"
                outer.repositories[name] = private
                outer.kinds[name] = request.get("type", "model")
                self.reply(200, {"url": f"{outer.url}/{name}"})

            def commit(self, name: str, payload: bytes) -> None:
                for line in payload.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        outer.files.setdefault(name, {})[value["path"]] = base64.b64decode(value["content"])
                self.reply(200, {"commitUrl": f"{outer.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True})

            def reply(self, status: int, value: Any) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubUploadServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
