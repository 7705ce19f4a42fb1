"""The whole demo at reduced size, from nothing, twice: byte-identical outs, nothing to do, one picture more, labels unread."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parents[2]
LABELS = {"dog", "train", "car", "cow", "sheep", "bird", "horse", "wolf", "drum", "bell", "duck", "guitar", "helicopter", "owl"}
SPARE = "i-train-003"
"""A picture left out at first and added later."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def build(folder: Path, *, lie: bool = False) -> Path:
    """A small project: the real code and graph, a subset of the demo data, parameters shrunk where size costs time.

    With `lie`, the ground-truth columns hold rubbish: no stage before evaluate may notice.
    """
    folder.mkdir()
    for name in ("dvc.yaml", ".dvcignore", "assets.toml"):
        shutil.copy(PROJECT / name, folder / name)
    shutil.copytree(PROJECT / "pipeline_steps", folder / "pipeline_steps", ignore=shutil.ignore_patterns("__pycache__"))
    yaml = YAML()
    params = yaml.load(PROJECT / "params.yaml")
    shrink(params)
    yaml.dump(params, folder / "params.yaml")
    rows = list(csv.DictReader((PROJECT / "data/demo/manifest.csv").open()))
    chosen = [row for row in rows if row["label"] in LABELS and row["id"] != SPARE]
    if lie:
        for number, row in enumerate(chosen):
            row["label"], row["caption"], row["group"] = f"label {number % 3}", "nonsense", "nonsense"
    copy_rows(folder, chosen, rows[0].keys())
    subprocess.run([DVC, "init", "--no-scm", "-q"], cwd=folder, check=True, env=environment())
    return folder


def copy_rows(folder: Path, rows: list[dict[str, str]], columns: Any) -> None:
    for row in rows:
        target = folder / "data/demo" / row["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / "data/demo" / row["file"], target)
    with (folder / "data/demo/manifest.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        writer.writeheader()
        writer.writerows(rows)


def shrink(params: Any) -> None:
    """Less of the same: fewer optimiser steps, samples and gallery items."""
    for key, value in SHRUNK.items():
        *sections, name = key.split(".")
        node = params
        for section in sections:
            node = node[section]
        assert name in node, f"{key} is no longer a parameter"
        node[name] = value


SHRUNK: dict[str, Any] = {
    "train.codec.steps": 20,
    "train.sound.views": 2,
    "train.optimiser.compose.steps": 20,
    "train.optimiser.compose.batch_size": 8,
    "train.optimiser.refine.steps": 10,
    "train.optimiser.refine.batch_size": 4,
    "train.checkpoint_every": 10,
    "train.sample_every": 10,
    "train.drawing.steps": 3,
    "evaluate.samples_per_sound": 2,
    "evaluate.unconditional_samples": 4,
    "evaluate.max_test_pairs": 8,
    "evaluate.reference_pictures": 30,
    "evaluate.bootstrap_repeats": 100,
    "evaluate.sensitivity_sounds": 1,
    "evaluate.gallery_pairs": 6,
    "evaluate.gallery_draws": 6,
}

DVC = str(Path(sys.executable).with_name("dvc"))


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "SONIFY_WHEELS": str(PROJECT / ".cache/wheels"),
        "OMP_NUM_THREADS": "1",
        "SONIFY_TRACKING": "off",
    }


def repro(folder: Path, *targets: str) -> str:
    done = subprocess.run(
        [DVC, "repro", *targets], cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def outs(folder: Path) -> dict[str, str]:
    """md5 of every out that DVC recorded; `reports/<stage>.json` hold seconds and are metrics, not data."""
    lock = YAML(typ="safe").load(folder / "dvc.lock")
    stages = lock["stages"]
    timed = {f"reports/{stage}.json" for stage in stages}
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"] if out["path"] not in timed}


def report(folder: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"reports/{stage}.json").read_text()))


def test_demo_from_nothing_twice(tmp_path: Path, assets: Path) -> None:
    first = build(tmp_path / "first")
    repro(first)
    before = outs(first)
    assert len(before) >= 10
    assert (first / "reports/index.html").stat().st_size > 10_000

    started = time.monotonic()
    said = repro(first)
    assert "Running stage" not in said, "a second dvc repro must find nothing to do"
    print(f"second dvc repro: {time.monotonic() - started:.1f} s")

    # Another folder, from nothing, with ground truth that lies: only what evaluate writes may differ.
    second = build(tmp_path / "second", lie=True)
    repro(second)
    after = outs(second)
    assert {path: md5 for path, md5 in after.items() if not path.startswith("reports/")} == {
        path: md5 for path, md5 in before.items() if not path.startswith("reports/")
    }
    # The same truth again: now the reports are the same bytes too, media of the report included.
    shutil.copy(first / "data/demo/manifest.csv", second / "data/demo/manifest.csv")
    repro(second)
    assert outs(second) == before

    one_picture_more(first)


def one_picture_more(folder: Path) -> None:
    """Exactly one decode, one caption, no audio embedding."""
    rows = list(csv.DictReader((PROJECT / "data/demo/manifest.csv").open()))
    chosen = [row for row in rows if row["label"] in LABELS]
    assert any(row["id"] == SPARE for row in chosen)
    copy_rows(folder, chosen, rows[0].keys())
    started = time.monotonic()
    repro(folder, "pair")
    print(f"one picture more, stages before train: {time.monotonic() - started:.1f} s")
    assert report(folder, "ingest")["computed"] == 1
    assert report(folder, "caption")["computed"] == 1
    assert report(folder, "embed")["sounds"]["computed"] == 0
