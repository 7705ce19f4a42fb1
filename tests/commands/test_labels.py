"""`sonify labels --gold N`: true pairs from the labels of the project's own tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from pipeline_steps.__main__ import run_stage
from pipeline_steps.cli import app
from pipeline_steps.commands.labels import hold_out_pairs
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO, IMAGES
from pipeline_steps.core.tables import read_table
from pipeline_steps.evaluate.ground_truth import match, parse_manifest
from pipeline_steps.project.create import create_project, renew_project
from tests.ingest.sources.test_pools import sound

LABELS = ("dog", "Dog ", "cat", "bell", "")


def labels(layout: ProjectPaths, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--project", str(layout.root), "labels", *arguments])


@pytest.fixture
def layout(tmp_path: Path) -> ProjectPaths:
    """20 images and 10 clips with a label, a license and a group of two files each; no clip is a bell."""
    lines, folder, random = ["file,label,license,group"], tmp_path / "files", np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(20):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"images/{number}.png")
        lines.append(f"images/{number}.png,{LABELS[number % 5]},MIT,i{number % 10}")
    for number in range(10):
        sound(folder / f"sounds/{number}.wav", 200 + 50 * number)
        lines.append(f"sounds/{number}.wav,{'cat' if number % 2 else 'dog'},CC0-1.0,s{number % 5}")
    table = folder / "table.csv"
    table.write_text("\n".join([*lines, "images/gone.png,cat,MIT,"]) + "\n")
    return create_project(tmp_path / "project", folder / "images", folder / "sounds", table)[0]


def test_the_written_table_and_parameters_hold_out_whole_groups(layout: ProjectPaths) -> None:
    out = layout.root / "labels.csv"
    done = labels(layout, "--gold", "3", "--out", str(out), "--json")
    assert done.exit_code == 0, done.output
    parameters = json.loads(done.output)["parameters"]
    again = labels(layout, "--gold", "3", "--out", str(layout.root / "again.csv"))
    assert (layout.root / "again.csv").read_bytes() == out.read_bytes(), "the choice depends on the seed alone"
    assert "holdout:" in again.output

    yaml = YAML()
    params = yaml.load(layout.params.read_text())
    for name, pool in parameters["ingest"]["pools"].items():
        params["ingest"]["pools"][name].update(pool)
    params["ingest"]["max_failed_fraction"] = 0.05
    params["evaluate"] = {**(params["evaluate"] or {}), **parameters["evaluate"]}
    with layout.params.open("w") as handle:
        yaml.dump(params, handle)
    renew_project(layout)
    checked = CliRunner().invoke(app, ["--project", str(layout.root), "check", "--sample", "0"])
    assert checked.exit_code == 0, checked.output
    run_stage("ingest", layout)
    images = read_table(layout.catalog / "images.parquet", IMAGES).to_pylist()
    audio = read_table(layout.catalog / "audio.parquet", AUDIO).to_pylist()
    truth = match(parse_manifest(out.read_text(), "labels.csv"), images, audio)
    assert len(truth.pairs) == 3
    assert {pair.label for pair in truth.pairs} == {"dog", "cat"}
    assert truth.num_unmatched == 1, "the file that is missing"
    for rows, key in ((images, "image_id"), (audio, "audio_id")):
        held_out = {row[key] for row in rows if row["holdout"]}
        assert {getattr(pair, key) for pair in truth.pairs} <= held_out
        groups = {row["group_id"]: {other["holdout"] for other in rows if other["group_id"] == row["group_id"]} for row in rows}
        assert all(len(kinds) == 1 for kinds in groups.values()), "no group is in gold and in pool"
        assert len(held_out) == 6, "two files in each group"
        assert {row["license"] for row in rows} == {"MIT" if key == "image_id" else "CC0-1.0"}


def test_labels_take_turns_and_another_seed_takes_other_files() -> None:
    def draw(count: int, seed: int) -> list[dict[str, str]]:
        rows = [
            {"kind": kind, "file": f"{label}-{n}", "path": f"{label}-{n}", "label": label, "group": "", "collection": kind,
             "split": "pool", "pair": ""}
            for label in ("a", "b", "c") for kind in ("image", "sound") for n in range(4)
        ]  # fmt: skip
        hold_out_pairs(rows, count, seed)
        return rows

    rows = draw(6, 0)
    pairs = {row["pair"] for row in rows if row["pair"]}
    assert pairs == {"a-1", "a-2", "b-1", "b-2", "c-1", "c-2"}
    assert all(sum(row["pair"] == pair for row in rows) == 2 for pair in pairs)
    assert sum(row["split"] == "gold" for row in rows) == 12
    assert rows != draw(6, 1)
    assert len({row["pair"] for row in draw(12, 0)}) == 12
    with pytest.raises(ConfigError, match="--gold 13: only 12 pairs are possible"):
        draw(13, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--gold", "test"], 2, "without DIR a number of pairs is required"),
        (["--gold", "99"], 2, "--gold 99: only 5 pairs are possible"),
        (["--gold", "1", "--label", "label_"], 3, "no column 'label_' (--label; did you mean 'label'?)"),
    ],
)
def test_what_cannot_be_done_is_said(layout: ProjectPaths, arguments: list[str], code: int, text: str) -> None:
    result = labels(layout, *arguments, "--out", str(layout.root / "labels.csv"))
    assert result.exit_code == code, result.output
    assert text in " ".join(result.output.split())
    assert not (layout.root / "labels.csv").exists()
