"""`sonify check` of a project: what it predicts is what a run does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline_steps.__main__ import run_stage
from pipeline_steps.cli import app
from pipeline_steps.commands.pool_trial import PoolTrial, prediction
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.project.create import create_project
from tests.factories.demo_project import PROJECT, demo_rows


def check(layout: ProjectPaths, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["--project", str(layout.root), "check", *arguments])


def own_project(root: Path, assets: Path, classes: tuple[str, ...], count: int) -> ProjectPaths:
    """A project for `count` images and sounds of each class of the demo, in two plain folders without tables."""
    for label in classes:
        for kind in ("image", "sound"):
            rows = [row for row in demo_rows() if row["label"] == label and row["kind"] == kind and row["split"] == "pool"]
            for row in rows[:count]:
                target = root / f"{kind}s" / Path(row["file"]).name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT / "data/demo" / row["file"], target)
    layout, _ = create_project(root / "project", root / "images", root / "sounds")
    layout.assets.parent.mkdir(parents=True)
    layout.assets.symlink_to(assets)
    return layout


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> ProjectPaths:
    return own_project(tmp_path_factory.mktemp("own"), assets, ("dog", "cow", "sheep", "helicopter"), 8)


def test_the_trial_of_a_whole_pool_gives_the_pairs_of_a_run(layout: ProjectPaths) -> None:
    before = {path for path in layout.root.rglob("*") if ".cache" not in path.parts}
    predicted = json.loads(check(layout, "--json").stdout)["trial"]
    assert {path for path in layout.root.rglob("*") if ".cache" not in path.parts} - before <= {layout.runs}
    for stage in ("ingest", "caption", "embed", "retrieve", "pair"):
        run_stage(stage, layout)
    report = json.loads(layout.report("pair").read_text())
    assert predicted["expected_pairs"] == report["splits"]
    assert predicted["abstained"] == report["abstained_all"]
    assert json.loads(layout.runtime("caption").read_text())["cache_misses"] == 0, "the trial's captions are not made again"


def test_a_sample_is_scaled_to_the_pool(layout: ProjectPaths) -> None:
    found = json.loads(check(layout, "--json", "--sample", "12").stdout)
    trial = found["trial"]
    assert (trial["sampled_images"], trial["sampled_audio"]) == (12, 12)
    factor = found["images"] / 12
    assert trial["expected_pairs"] == {split: round(count * factor) for split, count in trial["splits"].items()}
    assert "a sample of 12 images and 12 clips" in check(layout, "--sample", "12").output


def test_a_pool_that_gives_no_pair_is_named_with_the_stage_that_stops(tmp_path: Path, assets: Path) -> None:
    result = check(own_project(tmp_path, assets, ("dog", "cow"), 2))
    assert result.exit_code == 3, result.output
    assert "pair would stop: no pair was made: 4 images" in result.output
    assert "lower pair.null_quantile" in result.output


@pytest.mark.parametrize(
    ("splits", "truth", "text"),
    [
        ({"train": 9, "val": 1, "test": 1}, None, "too few to judge, 1 of 2 test pairs"),
        ({"train": 9, "val": 1, "test": 1}, "true.csv", ""),
        ({"train": 0, "val": 0, "test": 4}, None, "train would stop: no training pair"),
        ({"train": 9, "val": 1, "test": 4}, None, ""),
    ],
)
def test_what_a_run_would_lack_is_said_before_it(tmp_path: Path, splits: dict[str, int], truth: str | None, text: str) -> None:
    trial = PoolTrial(images=20, audio=20, sampled_images=20, sampled_audio=20, splits=splits)
    lines, problems = prediction(trial, ProjectPaths(tmp_path), {"evaluate": {"ground_truth": truth}})
    assert [text in problem for problem in problems] == ([True] if text else [])
    assert f"{sum(splits.values())} pairs of 20 images" in lines[1]


def test_missing_columns_are_all_named_with_their_keys(tmp_path: Path, assets: Path) -> None:
    layout = own_project(tmp_path, assets, ("dog",), 1)
    table = tmp_path / "images/table.csv"
    table.write_text("file,licence\n")
    text = layout.params.read_text()
    pool = f"    pictures:\n      root: {tmp_path / 'images'}\n"
    assert pool in text
    changed = pool + "      metadata: table.csv\n      columns: {license: license, author: maker}\n"
    layout.params.write_text(text.replace(pool, changed))
    result = check(layout)
    assert result.exit_code == 3, result.output
    assert "no column 'license' (columns.license; did you mean 'licence'?)" in result.output
    assert "no column 'maker' (columns.author)" in result.output
