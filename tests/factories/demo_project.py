"""A project of its own for tests that run a whole pipeline: the real code and graph, some of the demo data."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parents[2]
DVC = str(Path(sys.executable).with_name("dvc"))


def demo_rows() -> list[dict[str, str]]:
    """The demo's manifest."""
    return list(csv.DictReader((PROJECT / "data/demo/manifest.csv").open()))


def build(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Code, graph and the files of these rows; `write_params` makes it whole."""
    folder.mkdir()
    for name in ("dvc.yaml", ".dvcignore", "assets.toml"):
        shutil.copy(PROJECT / name, folder / name)
    shutil.copytree(PROJECT / "pipeline_steps", folder / "pipeline_steps", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "backbone/weights", folder / "backbone/weights")
    copy_rows(folder, rows)
    subprocess.run([DVC, "init", "--no-scm", "-q"], cwd=folder, check=True, env=environment())


def copy_rows(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """The files of these rows and a manifest of them."""
    for row in rows:
        target = folder / "data/demo" / row["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / "data/demo" / row["file"], target)
    with (folder / "data/demo/manifest.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_params(folder: Path, params: Any, changes: Mapping[str, Any]) -> None:
    """`params.yaml`: these parameters with some keys, written with dots, changed."""
    for key, value in changes.items():
        *sections, name = key.split(".")
        node = params
        for section in sections:
            node = node[section]
        assert name in node, f"{key} is no longer a parameter"
        node[name] = value
    YAML().dump(params, folder / "params.yaml")


def environment() -> dict[str, str]:
    """Of a run: wheels that this checkout has fetched, one thread, no tracking."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "SONIFY_WHEELS": str(PROJECT / ".cache/wheels"),
        "OMP_NUM_THREADS": "1",
        "SONIFY_TRACKING": "off",
    }


def repro(folder: Path, *targets: str, **more: str) -> str:
    """What `dvc repro` prints; `more` goes into its environment."""
    done = subprocess.run(
        [DVC, "repro", *targets],
        cwd=folder,
        env={**environment(), **more},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
