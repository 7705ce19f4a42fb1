"""Demo page as a running server: requests that it refuses, and a visit in Chromium."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from pipeline_steps.cli import app
from pipeline_steps.commands import demo as command
from pipeline_steps.commands.demo_page import MAX_FILE_MB, MAX_QUEUE
from tests.factories.page_project import served
from tests.services.browser_checks import CHROMIUM, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.timeout(600)
WAIT_MS = 120_000
HOSTILE = "<img src=x onerror=alert(1)> [a](javascript:alert(2)) \u202etxt.wav"


@pytest.fixture(scope="module")
def address(page_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(page_project, tmp_path_factory.mktemp("log") / "demo.log") as found:
        yield found


@pytest.fixture
def tone(tmp_path: Path) -> Path:
    path = tmp_path / "tone.wav"
    soundfile.write(path, 0.05 * np.sin(np.arange(24_000) * 0.06), 48_000)
    return path


class Client:
    """What the page's script sends."""

    def __init__(self, address: str) -> None:
        self._http = httpx.Client(base_url=address, timeout=120)
        dependencies = self._http.get("/config").json()["dependencies"]
        self._draw = next(found for found in dependencies if found["api_name"] == "draw")

    def upload(self, path: Path) -> str:
        with path.open("rb") as stream:
            response = self._http.post("/gradio_api/upload", files={"files": (path.name, stream)})
        assert response.status_code == 200, response.text
        return str(response.json()[0])

    def join(self, path: str, session: str, model: str = "models/audio2image") -> httpx.Response:
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "tone.wav"}
        values = [file, None, 0, 0, "none", "", 0.5, 2, 0, model, None]
        body = {"data": values, "fn_index": self._draw["id"], "session_hash": session}
        return self._http.post("/gradio_api/queue/join", json=body)

    def result(self, session: str) -> dict[str, Any]:
        with self._http.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "process_completed":
                    return message
        raise AssertionError("no result")


def test_requests_of_and_for_other_hosts_are_refused(address: str) -> None:
    assert httpx.get(address, headers={"Host": "elsewhere.example"}).status_code == 421
    assert httpx.get(address, headers={"Host": "localhost:1"}).status_code == 200
    for origin, status in (("http://elsewhere.example", 421), ("null", 421), (address, 422)):
        assert httpx.post(f"{address}/gradio_api/upload", headers={"Origin": origin}).status_code in {status, 400}, origin
    policy = httpx.get(address).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert httpx.get(f"{address}/docs").status_code == 404


def test_files_of_this_machine_are_neither_served_nor_read(address: str, page_project: Path, tone: Path) -> None:
    for path in ("/etc/passwd", str(page_project / "params.yaml"), "params.yaml"):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code == 403, path
    client = Client(address)
    client.join(str(page_project / "data/demo/sounds/s-bell-000.ogg"), "a")
    assert not client.result("a")["success"], "the file was not uploaded"
    client.join(client.upload(tone), "b")
    assert client.result("b")["success"]
    client.join(client.upload(tone), "c", model=str(page_project / "models/audio2image"))
    assert not client.result("c")["success"], "the folder is not among the models that are offered"


def test_large_uploads_and_a_full_queue_are_refused(address: str, tone: Path) -> None:
    files = {"files": ("large.wav", bytes(MAX_FILE_MB * 2**20 + 1))}
    assert httpx.post(f"{address}/gradio_api/upload", files=files, timeout=60).status_code == 413
    client = Client(address)
    path = client.upload(tone)
    responses = [client.join(path, f"queue-{number}") for number in range(4 * MAX_QUEUE)]
    refused = [response for response in responses if response.status_code != 200]
    assert 0 < len(refused) < len(responses)
    assert {response.status_code for response in refused} == {503}
    assert f"Queue is full. Max size is {MAX_QUEUE}" in refused[0].text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_visit(address: str, page_project: Path, tone: Path) -> None:
    demo = page_project / "data/demo"
    requests: list[str] = []
    problems: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: (problems.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if "Content Security Policy" in line.text else None)
        page.goto(address)
        page.locator("#draw").wait_for()
        draw_and_mix(page, demo)
        refuse_files(page, tone)
        page.get_by_role("tab", name="Image to sounds").click()
        page.locator("#picture input[type=file]").set_input_files(demo / "images/i-dog-000.webp")
        page.locator("#events", has_text="dog").wait_for()
        page.locator(".reason:visible").nth(3).wait_for()
        first = page.locator(".reason:visible").first.inner_text()
        assert "s-dog-" in first
        assert "for: " in first
        page.locator(".suggested:visible").nth(3).wait_for()
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, "nothing is wider than a telephone"
    assert problems == []
    assert any(url.endswith("/mixture.wav") for url in requests), "the player gets a file"
    outside = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert outside == [], "nothing leaves this machine"


def draw_and_mix(page: Page, demo: Path) -> None:
    """Drop a sound, mix it with a second one, choose a room and an example."""
    status = page.locator("#status")
    start = time.monotonic()
    page.locator("#first input[type=file]").set_input_files(demo / "sounds/s-dog-004.ogg")
    page.locator("#drawn img").nth(3).wait_for()
    print(f"four images {time.monotonic() - start:.1f} s after the sound was dropped")
    assert page.locator("#drawn .grid-container img, #drawn .thumbnail-item img").count() == 4
    assert "s-dog-004.ogg 0 dB, seed 0" in status.inner_text()
    page.locator("#mix").get_by_text("Mix with a second sound").click()
    page.locator("#second input[type=file]").set_input_files(demo / "sounds/s-bell-000.ogg")
    page.locator("#status", has_text="s-bell-000.ogg 0 dB").wait_for()
    page.locator("#second-gain input[type=number]").fill("-12")
    page.locator("#second-gain input[type=number]").press("Enter")
    page.locator("#room").get_by_text("hall").click()
    page.locator("#status", has_text="s-dog-004.ogg 0 dB + s-bell-000.ogg -12 dB, hall, seed 0").wait_for()
    page.locator("#again").click()
    page.locator("#status", has_text="hall, seed 1").wait_for()
    assert page.locator("#history img").count() >= 4
    page.locator("#sounds").get_by_text("s-badger-000").click()
    page.locator("#status", has_text="s-badger-000.flac").wait_for()


def refuse_files(page: Page, tone: Path) -> None:
    """A hostile name is shown as text; a large file and a file that is no sound are refused with a message."""
    slot = page.locator("#first")
    slot.get_by_label("Clear").first.click()
    file = {"name": HOSTILE, "mimeType": "audio/wav", "buffer": tone.read_bytes()}
    slot.locator("input[type=file]").set_input_files([file])  # type: ignore[list-item]
    page.locator("#status", has_text="onerror=alert").wait_for()
    assert "\u202e" not in page.locator("#status").inner_text()
    assert page.locator("#status img, #status a, #history img[src=x]").count() == 0
    slot.get_by_label("Clear").first.click()
    large = {"name": "large.wav", "mimeType": "audio/wav", "buffer": bytes(MAX_FILE_MB * 2**20 + 1)}
    slot.locator("input[type=file]").set_input_files([large])  # type: ignore[list-item]
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    text = {"name": "text.wav", "mimeType": "audio/wav", "buffer": b"not a sound"}
    slot.locator("input[type=file]").set_input_files([text])  # type: ignore[list-item]
    page.get_by_text("text.wav: AUD_CORRUPT").first.wait_for()


def test_a_missing_package_and_a_taken_port_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["--project", str(tmp_path), "demo", *arguments])
        assert len(result.stderr.splitlines()) == 1, result.stderr
        return result.exit_code, result.stderr

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, message = call("--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "cannot be used" in message
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    code, message = call()
    assert code == 2
    assert "gradio, which is not installed -> pip install -c constraints.txt -e '.[demo]'" in message


def test_a_page_without_a_model_starts_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "demo.log"
    project = tmp_path / "project"
    project.mkdir()
    tone = tmp_path / "tone.wav"
    soundfile.write(tone, 0.05 * np.sin(np.arange(24_000) * 0.06), 48_000)
    with served(project, log) as address:
        client = Client(address)
        client.join(client.upload(tone), "s")
        result = client.result("s")
        assert not result["success"]
        assert "there is no trained model -&gt; sonify run train" in result["output"]["error"]
    assert "there is no trained model -> sonify run train; the page draws as soon as this is done" in log.read_text()
