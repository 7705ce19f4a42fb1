"""The gold benchmark on a tiny folder of its own, from files to bars."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gold_retrieval import bars, rank_of

PAIRS = {"dog": "dog-000", "trumpet": "trumpet-000"}
POOL = ["sheep-000", "train-000", "dog-004"]


@pytest.fixture
def folder(tmp_path: Path, demo: Path) -> Path:
    """A folder with a manifest: two pairs, three pool sounds, one file that is no sound."""
    made = tmp_path / "set"
    (made / "files").mkdir(parents=True)
    rows = []
    with (demo / "manifest.csv").open(encoding="utf-8", newline="") as handle:
        known = {row["id"]: row for row in csv.DictReader(handle)}
    for pair, name in PAIRS.items():
        for kind, letter in (("image", "i"), ("sound", "s")):
            rows.append({**known[f"{letter}-{name}"], "split": "gold", "pair": pair, "label": pair, "kind": kind})
    rows += [{**known[f"s-{name}"], "split": "pool", "pair": ""} for name in POOL]
    for row in rows:
        target = made / "files" / Path(row["file"]).name
        shutil.copy(demo / row["file"], target)
        row["file"] = f"files/{target.name}"
    (made / "files/broken.ogg").write_bytes(b"OggS" + bytes(60))
    rows.append({**rows[-1], "id": "s-broken", "file": "files/broken.ogg"})
    with (made / "manifest.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return made


def test_it_runs_on_any_folder(project: Path, folder: Path, assets: Path, tmp_path: Path) -> None:
    assert assets.is_dir()
    command = [sys.executable, "-m", "benchmarks.gold_retrieval", "--gold", str(folder), "--pool", str(folder)]
    command += ["--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in {0, 1}, done.stderr
    assert "rejected: files/broken.ogg" in done.stderr
    assert "bar: ours >= halfway" in done.stdout
    answer = json.loads((tmp_path / "out.json").read_text())
    assert answer["candidates"] == 5
    ours, random = answer["label"]["all"]["ours"], answer["label"]["all"]["random (expected)"]
    assert ours["n"] == 2
    assert ours["R@1"]["value"] == 1.0, "a photograph of a dog finds a dog among five sounds"
    assert ours["MRR"]["value"] > random["MRR"]["value"]
    assert answer["label"]["seen"]["ours"]["n"] == 1


def test_ties_and_missing_scores_count_against_us() -> None:
    relevant = np.array([False, True, False, False])
    assert rank_of(np.array([0.1, 0.9, 0.2, 0.3]), relevant) == 1
    assert rank_of(np.array([0.5, 0.5, 0.5, 0.1]), relevant) == 3
    assert rank_of(None, relevant) == 4
    assert rank_of(np.array([0.1, 0.9, 0.2, 0.3]), np.zeros(4, bool)) == 4


def test_bars_compare_with_the_better_baseline(project: Path) -> None:
    ten = {
        "plain: a": 0.2,
        "plain: b": 0.4,
        "ours": 0.49,
        "oracle: label -> plain bridge": 0.6,
        "oracle: label -> our space": 0.6,
    }
    found = bars({"all": {name: {"R@10": {"value": value}} for name, value in ten.items()}})
    assert [bar["met"] for bar in found.values()] == [False, False]
    assert next(iter(found.values()))["wanted"] == pytest.approx(0.5)
