"""A real HTTP server that speaks as much of the OpenAI protocol as the captioner uses, and misbehaves as told."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
from PIL import Image


class Ask(NamedTuple):
    """One chat request as the server saw it. The red value of the first pixel and the sum of all pixels tell pictures apart."""

    shade: int
    total: int
    text: str
    body: dict[str, Any]
    key: str
    at: float


class Reply(NamedTuple):
    """What to do with a request."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] | None = None
    wait: float = 0.0
    raw: bytes | None = None
    cut: bool = False


def events(*sounds: str) -> str:
    """An answer that lists sounds."""
    common = {"source": "thing", "visible": True, "distance": "near", "salience": 8, "likelihood": 9}
    return json.dumps({"events": [{"sound": sound, **common} for sound in sounds]})


class ChatServer:
    """Serves `answer(ask)` on a free port of the loopback; a context manager. `asks` is every request, in order of arrival."""

    def __init__(self, answer: Callable[[Ask], Reply], models: int = 200) -> None:
        self.asks: list[Ask] = []
        self.models = models
        self.closed = False
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                if outer.closed:
                    self.close_connection = True
                    return
                listed = json.dumps({"object": "list", "data": [{"id": "tiny-vlm"}]}).encode()
                self.reply(outer.models, listed if outer.models == 200 else b"no", {})

            def do_POST(self) -> None:
                if outer.closed:  # a kept-alive connection dies with its server
                    self.close_connection = True
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                image, text = body["messages"][0]["content"]
                png = base64.b64decode(image["image_url"]["url"].split(",", 1)[1])
                pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
                ask = Ask(
                    int(pixels[0, 0, 0]),
                    int(pixels.sum()),
                    text["text"],
                    body,
                    self.headers.get("Authorization", ""),
                    time.monotonic(),
                )
                with outer._lock:
                    outer.asks.append(ask)
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                try:
                    does = answer(ask)
                    time.sleep(does.wait)
                finally:
                    with outer._lock:
                        outer.in_flight -= 1
                message = {"choices": [{"message": {"content": does.text}}], "model": "tiny-vlm-served"}
                payload = does.raw if does.raw is not None else json.dumps(message).encode()
                self.reply(does.status, payload, does.headers or {}, does.cut)

            def reply(self, status: int, payload: bytes, headers: dict[str, str], cut: bool = False) -> None:
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(payload)))
                    self.end_headers()
                    self.wfile.write(payload[: len(payload) // 2] if cut else payload)
                except (BrokenPipeError, ConnectionResetError):
                    pass
                if cut:
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening; requests under way are not waited for."""
        self.closed = True
        self._server.shutdown()
        self._server.server_close()
