"""A small project for the tests of commands: in git, with a lock and a cache as DVC makes them, and a store of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from pipeline_steps.cli import app
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import PAIRS
from pipeline_steps.core.tables import write_table
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from tests.factories.catalog import write_catalog

PROJECT = Path(__file__).resolve().parents[2]
IMAGES, SOUNDS = ("dog-000", "dog-001", "cow-000"), ("dog-000", "cow-000")

Sonify = Callable[..., Result]


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments, "-q"], cwd=root, check=True, capture_output=True)


@pytest.fixture
def sonify(pool: ProjectPaths) -> Sonify:
    """`sonify` in the project."""

    def call(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--project", str(pool.root), *arguments])

    return call


def json_output(result: Result) -> dict[str, Any]:
    return dict(json.loads(result.stdout))


@pytest.fixture
def ids() -> dict[str, str]:
    """Item ids by file stem; filled by `pool`."""
    return {}


@pytest.fixture
def pool(
    tmp_path: Path, demo: Path, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> ProjectPaths:
    """Raw files, table, catalog, shards and pairs of a few demo items; `dvc.lock` as DVC writes it, committed with git."""
    monkeypatch.setenv("SONIFY_TRACKING", "on")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "project"
    layout = ProjectPaths(root)
    raw = root / "data/demo"
    raw.mkdir(parents=True)
    rows = ["file,label,split"]
    for kind, names, suffix in (("image", IMAGES, "webp"), ("sound", SOUNDS, "ogg")):
        for name in names:
            file = f"{kind[0]}-{name}.{suffix}"
            shutil.copy(demo / f"{kind}s" / file, raw / file)
            rows.append(f'{file},"{name.split("-")[0]}, ""quoted""",pool')
    (raw / "manifest.csv").write_text("\r\n".join(rows) + "\r\n", newline="")
    ids |= write_catalog(layout, demo, IMAGES, SOUNDS)
    rows_of_pairs = [pair(ids, "i-dog-000", "s-dog-000", "train"), pair(ids, "i-cow-000", "s-cow-000", "test")]
    write_table(layout.pairs / "pairs.parquet", PAIRS, rows_of_pairs)
    params = {
        "ingest": {"root": "data/demo", "metadata": "manifest.csv", "columns": {"file": "file"}},
        "evaluate": {"ground_truth": "data/demo/manifest.csv"},
    }
    YAML().dump(params, layout.params)
    shutil.copy(empty_database, root / "mlflow.db")
    (layout.model).mkdir(parents=True)
    (layout.model / "weights.txt").write_text("weights")
    git(root, "init", "-q")
    dvc(root, "init")
    (root / ".gitignore").write_text("/data/*\n!/data/demo\n/models\n/.runs\n/.cache\n/mlflow.db\n/mlartifacts\n")
    return layout


def pair(ids: dict[str, str], image: str, sound: str, split: str) -> dict[str, Any]:
    """One row of the pair table."""
    row: dict[str, Any] = {}
    for field in PAIRS.schema:
        kind = str(field.type)
        row[field.name] = "" if kind == "string" else False if kind == "bool" else [] if kind.startswith("list") else 0
    tracks = [{"audio_id": ids[sound], "phrase": "a sound", "gain_db": 0.0}]
    known = {"pair_id": f"{ids[image][:16]}{ids[sound][:16]}", "image_id": ids[image], "split": split, "tracks": tracks}
    return row | known


def commit(layout: ProjectPaths, stage_out: dict[str, str], message: str) -> str:
    """Write a lock in which `train` made the model from the pairs, put everything in DVC's cache, and commit."""
    stages: dict[str, Any] = {
        "pair": {"cmd": "true", "outs": ["data/pairs", "data/catalog", "data/media"], "deps": ["data/demo"]},
        "train": {"cmd": "true", "outs": ["models/audio2image"], "deps": ["data/pairs"]},
        "evaluate": {"cmd": "true", "outs": [], "deps": ["models/audio2image", "data/pairs"]},
    }
    YAML().dump({"stages": stages}, layout.root / "dvc.yaml")
    dvc(layout.root, "commit", "-f")
    git(layout.root, "add", "-A")
    git(layout.root, "commit", "-q", "-m", message)
    stage_out |= {path: hash_path(layout.root / path) for path in ("data/pairs", "models/audio2image")}
    return git(layout.root, "rev-parse", "HEAD").strip()
