"""A project for the demo page: a small model, and a few demo files through the stages ingest to retrieve, three held out."""

from __future__ import annotations

import csv
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from ruamel.yaml import YAML

from pipeline_steps.core.project_paths import ProjectPaths
from tests.factories.demo_project import PROJECT, copy_rows, write_params

POOL = ("i-horse-000", "s-dog-004", "s-dog-002", "s-bell-000", "s-rain-000")
HELD_OUT = ("i-dog-000", "i-badger-000", "s-badger-000")


def build_page_project(folder: Path, assets: Path, model: Path) -> Path:
    """Write the project; returns its folder."""
    from pipeline_steps.__main__ import run_stage

    layout = ProjectPaths(folder)
    with (PROJECT / "data/demo/manifest.csv").open() as stream:
        copy_rows(folder, [row for row in csv.DictReader(stream) if row["id"] in POOL + HELD_OUT])
    changes = {"embed.yamnet_minilm.text_pooling": "plain", "retrieve.annoy.min_recall": 0.0}
    write_params(folder, YAML().load(PROJECT / "params.yaml"), changes)
    layout.assets.symlink_to(assets)
    shutil.copytree(model, layout.model)
    for stage in ("ingest", "caption", "embed", "retrieve"):
        run_stage(stage, layout)
    return folder


@contextmanager
def served(project: Path, log: Path) -> Iterator[str]:
    """Address of `sonify demo` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--project", str(project), "demo", "--port", str(port)]
    code = "from pipeline_steps.cli import app; app()"
    environment = {**os.environ, "SONIFY_TRACKING": "off"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=output, stderr=output, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 240
        while not answers(address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz").status_code == 200
    except httpx.TransportError:
        return False
