"""The whole demo at reduced size, from nothing, twice: byte-identical outs, nothing to do, one picture more, labels unread."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline_steps.core.project_paths import ProjectPaths
from tests.factories.checkpoints.stable_diffusion import small_backbone
from tests.factories.demo_project import DVC, PROJECT, build, copy_rows, demo_rows, environment, repro, write_params

LABELS = {"dog", "train", "car", "cow", "sheep", "bird", "horse", "wolf", "drum", "bell", "duck", "guitar", "helicopter", "owl"}
SPARE = "i-train-003"
"""A picture left out at first and added later."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SHRUNK: dict[str, Any] = {
    "train.resolution": 32,
    "train.audio.num_augmentations": 2,
    "train.ip_adapter.backbone.model": "small_backbone",
    "train.ip_adapter.phases.adapter.max_steps": 20,
    "train.ip_adapter.phases.adapter.batch_size": 4,
    "train.checkpointing_steps": 10,
    "train.validation_steps": 10,
    "train.sampling.num_inference_steps": 3,
    "evaluate.samples_per_audio": 2,
    "evaluate.unconditional_samples": 4,
    "evaluate.max_test_pairs": 8,
    "evaluate.num_calibration_images": 30,
    "evaluate.num_bootstrap": 100,
    "evaluate.gain_sensitivity.num_clips": 1,
    "evaluate.abilities.num_clips": 3,
    "evaluate.abilities.num_samples": 1,
    "evaluate.report.max_pairs": 6,
    "evaluate.report.max_samples": 6,
}
"""Less of the same: a small backbone of random weights, fewer optimiser steps, samples and gallery items."""


def build_small(folder: Path, *, lie: bool = False) -> Path:
    """A subset of the demo data, parameters shrunk where size costs time.

    With `lie`, the ground-truth columns hold rubbish: no stage before evaluate may notice.
    """
    chosen = [row for row in demo_rows() if row["label"] in LABELS and row["id"] != SPARE]
    if lie:
        for number, row in enumerate(chosen):
            row["label"], row["caption"], row["group"] = f"label {number % 3}", "nonsense", "nonsense"
    build(folder, chosen)
    small_backbone(folder / "small_backbone")
    write_params(folder, YAML().load(PROJECT / "params.yaml"), SHRUNK)
    return folder


def outs(folder: Path) -> dict[str, str]:
    """md5 of every out that DVC recorded; `reports/<stage>.json` hold seconds and are metrics, not data."""
    lock = YAML(typ="safe").load(folder / "dvc.lock")
    stages = lock["stages"]
    timed = {f"reports/{stage}.json" for stage in stages}
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"] if out["path"] not in timed}


def report(folder: Path, stage: str) -> dict[str, Any]:
    """Report of a stage with the figures of its last execution."""
    layout = ProjectPaths(folder)
    return {**json.loads(layout.report(stage).read_text()), **json.loads(layout.runtime(stage).read_text())}


def test_demo_from_nothing_twice(tmp_path: Path, assets: Path) -> None:
    first = build_small(tmp_path / "first")
    repro(first)
    before = outs(first)
    assert len(before) >= 10
    assert (first / "reports/index.html").stat().st_size > 10_000

    started = time.monotonic()
    said = repro(first)
    assert "Running stage" not in said, "a second dvc repro must find nothing to do"
    print(f"second dvc repro: {time.monotonic() - started:.1f} s")

    run_tutorial(first)

    # Another folder, from nothing, with ground truth that lies: only what evaluate writes may differ.
    second = build_small(tmp_path / "second", lie=True)
    repro(second)
    after = outs(second)
    assert {path: md5 for path, md5 in after.items() if not path.startswith("reports/")} == {
        path: md5 for path, md5 in before.items() if not path.startswith("reports/")
    }
    # The same truth again: now the reports are the same bytes too, media of the report included.
    shutil.copy(first / "data/demo/manifest.csv", second / "data/demo/manifest.csv")
    repro(second)
    assert outs(second) == before

    commands_of_the_quick_start(first)
    one_picture_more(first)


def run_tutorial(folder: Path) -> None:
    """The code of the notebook, as a script without a main guard in the folder of the tutorials."""
    notebook = json.loads((PROJECT / "docs/tutorials/python.ipynb").read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    script = folder / "docs/tutorials/python.py"
    script.parent.mkdir(parents=True)
    script.write_text("\n".join(code))
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=script.parent,
        env={**environment(), "PYTHONPATH": str(PROJECT), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert " pairs" in done.stdout


def commands_of_the_quick_start(folder: Path) -> None:
    """Every `sonify` and `dvc` command of docs/tutorials/quickstart.md succeeds, and writes the files that it names."""
    page = (PROJECT / "docs/tutorials/quickstart.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (?:sonify|dvc) .*$", page, re.MULTILINE)
    assert {command.split()[1] for command in (line[2:] for line in commands)} == {"report", "draw", "find", "repro"}
    for line in commands:
        program, *words = shlex.split(line[2:], comments=True)
        start = [DVC] if program == "dvc" else [sys.executable, "-c", "from pipeline_steps.cli import app; app()"]
        done = subprocess.run([*start, *words], cwd=folder, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
        if "-o" in words:
            assert (folder / words[words.index("-o") + 1]).stat().st_size > 0, line


def one_picture_more(folder: Path) -> None:
    """Exactly one decode, one caption, no audio embedding."""
    chosen = [row for row in demo_rows() if row["label"] in LABELS]
    assert any(row["id"] == SPARE for row in chosen)
    copy_rows(folder, chosen)
    started = time.monotonic()
    repro(folder, "pair")
    print(f"one picture more, stages before train: {time.monotonic() - started:.1f} s")
    assert report(folder, "ingest")["cache_misses"] == 1
    assert report(folder, "caption")["cache_misses"] == 1
    assert report(folder, "embed")["sounds"]["cache_misses"] == 0
