"""Stage `evaluate` on a synthetic data set: the win rate separates a generator that uses the audio from one that does not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.schemas import IMAGES, PAIRS
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.evaluate.config import AbilitiesConfig, GainSensitivityConfig
from pipeline_steps.evaluate.stage import evaluate, read_ground_truth, read_tables
from pipeline_steps.tracking.client.tracker import NoOpTracker
from tests.evaluate.abilities.property_generator import PropertyGenerator
from tests.evaluate.synthetic_dataset import CLASSES, CONFIG, ColorGenerator, OtherReports, SyntheticDataset, files


class RecordingTracker(NoOpTracker):
    """Keeps the numbers of the model and of the pipeline, and the warnings."""

    def __init__(self) -> None:
        self.logged: list[tuple[str, Any]] = []
        self.warnings: list[str] = []

    def log_pipeline_metrics(self, values: Mapping[str, Any]) -> None:
        self.logged.append(("pipeline", values))

    def log_model_metrics(
        self, folder: Path, values: Mapping[str, Any], dataset: Path | None = None, warnings: Sequence[str] = ()
    ) -> None:
        self.logged.append(("model", values))
        self.warnings += warnings


NOT_MEASURED = GainSensitivityConfig(num_clips=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> SyntheticDataset:
    return SyntheticDataset(tmp_path_factory.mktemp("world"), assets)


@pytest.fixture(scope="module")
def evaluated(world: SyntheticDataset) -> dict[str, bytes]:
    report = evaluate(CONFIG, world.layout, ColorGenerator(), NoOpTracker())
    report.check_balance()
    assert report.n_in == 6 + 3
    return files(world.layout.reports)


def test_a_generator_that_uses_audio_wins_and_its_controls_do_not(evaluated: dict[str, bytes]) -> None:
    found = json.loads(evaluated["evaluation.json"])
    rows = found["test"]["rows"]
    assert rows["model"]["win_rate_augnet"]["value"] > 0.9
    assert rows["shuffled_audio"]["win_rate_augnet"]["value"] < 0.4  # at most 4 negatives: 1/2 - 1/2 / 4
    assert rows["real_images"]["win_rate_augnet"]["value"] > 0.9
    assert rows["text_oracle"]["applicable"] is False
    lookup = rows["nearest_training_image"]["win_rate_augnet"]["value"]  # training images of the class of the clip
    assert lookup > 0.9
    difference = rows["model_minus_nearest_training_image"]["win_rate_augnet"]
    assert difference["value"] == pytest.approx(rows["model"]["win_rate_augnet"]["value"] - lookup, abs=1e-5)
    assert difference["low"] <= difference["value"] <= difference["high"]
    copies = found["memorisation"]["sets"]["test"]
    assert found["memorisation"]["compared_images"] == found["memorisation"]["training_images"] == 9
    assert copies["model"]["copy_fraction"]["value"] > 0.3  # the same shapes in the same places, with noise
    assert copies["held_out_images"]["nearest_rmse"]["n"] == 6
    assert 0 < copies["model"]["recalled_fraction"]["value"] <= 1
    assert (rows["model"]["density_augnet"]["n"], rows["model"]["coverage_augnet"]["n"]) == (12, 6)  # generated, real
    assert 0 < found["judges"]["augnet"]["ais_leave_group_out_r2"] < 1
    assert found["judges"]["augnet"]["ais_training_sound_groups"] == 9
    assert found["test"]["too_small_to_rank"] is True
    assert found["gold"]["n_pairs"] == found["gold_seen_classes"]["n_pairs"] == 3
    entry = rows["model"]["kid_augnet"]
    assert set(entry) >= {"value", "low", "high", "n", "clusters", "judge", "seed", "sample_rate_hz", "n_real"}
    assert found["retrieval"]["rows"]["pipeline"]["recall_at_10"]["value"] == 1.0  # 18 sounds; own class first
    assert found["sensitivity"]["gain_-12_db"]["value"] < found["sensitivity"]["other_sound"]["value"]
    assert any("independent sounds" in warning for warning in found["warnings"])


def test_the_report_is_complete_escaped_and_reproducible(world: SyntheticDataset, evaluated: dict[str, bytes]) -> None:
    page = evaluated["index.html"].decode()
    for attack in ("<script>", "<svg onload", "<b>ball</b>"):
        assert attack not in page
    assert "&lt;b&gt;ball&lt;/b&gt;" in page
    assert "{{7*7}}" in page
    for name in evaluated:
        if name.startswith(("samples/picture", "audio/")):
            assert f'src="{name}"' in page
    assert str(world.layout.root) not in page
    assert "on the 6 of 6 pairs that have one" in page
    assert "Gain over the nearest training image" in page
    assert "Copies of training images" in page
    assert "test: real images, n=6" in page
    assert not re.search("ceiling|far from perfect", page)
    evaluate(CONFIG, world.layout, ColorGenerator(), NoOpTracker())
    assert files(world.layout.reports) == evaluated


def test_a_generator_that_ignores_audio_wins_half(world: SyntheticDataset, evaluated: dict[str, bytes], tmp_path: Path) -> None:
    elsewhere = OtherReports(world.layout.root, tmp_path)
    config = CONFIG.model_copy(
        update={
            "gain_sensitivity": NOT_MEASURED,
            "samples_per_audio": 8,
            "cache_dir": str(world.layout.result_cache),
        }
    )
    tracker = RecordingTracker()
    evaluate(config, elsewhere, ColorGenerator(ignores_audio=True), tracker)
    headline = json.loads((tmp_path / "metrics.json").read_text())
    assert tracker.logged == [("pipeline", headline), ("model", headline)]
    assert any(line.startswith("test: the win rate 0.5") and "not above chance" in line for line in tracker.warnings)
    found = json.loads((tmp_path / "evaluation.json").read_text())["test"]["rows"]["model"]
    assert found["win_rate_augnet"]["value"] == pytest.approx(0.5, abs=0.02)
    assert found["ais_win_rate_aisfx_augnet"]["value"] == pytest.approx(0.5, abs=0.02)


def test_a_judge_of_a_used_family_is_rejected(world: SyntheticDataset, evaluated: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match="augnet has model family augnet, which is also used in model"):
        evaluate(CONFIG, world.layout, ColorGenerator(families=frozenset({"augnet"})), NoOpTracker())


def test_without_a_table_there_is_no_ground_truth(world: SyntheticDataset) -> None:
    config = CONFIG.model_copy(update={"ground_truth": None})
    truth = read_ground_truth(config, world.layout, read_tables(world.layout))
    assert (truth.labels, truth.pairs, truth.num_unmatched) == ({}, (), 0)


def test_damaged_or_missing_inputs_are_named(world: SyntheticDataset, evaluated: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv is missing"):
        evaluate(CONFIG.model_copy(update={"ground_truth": "nowhere.csv"}), world.layout, ColorGenerator(), NoOpTracker())
    path = world.layout.embeddings / "text.npy"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4] + b"\0\0\0\1")
    try:
        with pytest.raises(IntegrityError, match=r"text\.npy: sha256 differs"):
            evaluate(CONFIG, world.layout, ColorGenerator(), NoOpTracker())
    finally:
        path.write_bytes(kept)


def test_too_few_calibration_images_still_end_in_a_report(
    world: SyntheticDataset, evaluated: dict[str, bytes], tmp_path: Path
) -> None:
    path = world.layout.catalog / "images.parquet"
    kept = path.read_bytes()
    rows = read_table(path, IMAGES).to_pylist()
    tested = {
        row["image_id"] for row in read_table(world.layout.pairs / "pairs.parquet", PAIRS).to_pylist() if row["split"] == "test"
    }
    free = [row["image_id"] for row in rows if not row["holdout"] and row["image_id"] not in tested]
    try:
        write_table(path, IMAGES, [{**row, "holdout": row["holdout"] or row["image_id"] in free[2:]} for row in rows])
        report = evaluate(CONFIG, OtherReports(world.layout.root, tmp_path), ColorGenerator(), NoOpTracker())
    finally:
        path.write_bytes(kept)
    report.check_balance()
    assert (report.n_in, report.n_ok) == (9, 0)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["too_few_to_judge"].startswith("too few to judge: 2 of at least 3 images outside the evaluated groups")
    assert (tmp_path / "index.html").read_text().count("generated from this sound") == 9


def test_training_pairs_of_one_sound_group_give_no_audio_image_agreement(
    world: SyntheticDataset, evaluated: dict[str, bytes], tmp_path: Path
) -> None:
    path = world.layout.pairs / "pairs.parquet"
    kept = path.read_bytes()
    rows = read_table(path, PAIRS).to_pylist()
    one = next(row for row in rows if row["split"] == "train")
    alike = {name: one[name] for name in ("tracks", "audio_group")}
    write_table(path, PAIRS, [{**row, **alike} if row["split"] == "train" else row for row in rows])
    config = CONFIG.model_copy(update={"gain_sensitivity": NOT_MEASURED, "cache_dir": str(world.layout.result_cache)})
    try:
        evaluate(config, OtherReports(world.layout.root, tmp_path), ColorGenerator(), NoOpTracker())
    finally:
        path.write_bytes(kept)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert not [name for name in found["test"]["rows"]["model"] if name.startswith("ais")]
    warning = "ais_win_rate_aisfx: not measured; the regression needs at least 3 training pairs of 2 sound groups"
    assert [text for text in found["warnings"] if text.startswith(warning)] == [f"{warning}, and there are 9 of 1"]
    assert warning in (tmp_path / "index.html").read_text()


def test_abilities_are_in_the_metrics_the_plots_and_the_page(world: SyntheticDataset, tmp_path: Path, toy: None) -> None:
    config = CONFIG.model_copy(
        update={
            "abilities": AbilitiesConfig(num_clips=3, num_samples=1),
            "gain_sensitivity": NOT_MEASURED,
            "image_judges": ["toy"],
            "cache_dir": str(world.layout.result_cache),
        }
    )
    numbers: dict[str, float] = {}

    class Recorder(NoOpTracker):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            numbers.update(metrics)

    evaluate(config, OtherReports(world.layout.root, tmp_path), PropertyGenerator("loudest"), Recorder())
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    block = evaluation["abilities"]
    assert set(block) == {"semantic_mixing", "interpolation", "loudness", "acoustic_space", "words_and_sound"}
    assert block["semantic_mixing"]["sweep"]["spearman"]["value"] > 0.7
    assert evaluation["judges"]["toy"]["ability_classes"] == len(CLASSES)
    assert numbers["abilities/model/semantic_mixing.spearman"] == block["semantic_mixing"]["sweep"]["spearman"]["value"]
    assert "test/model/copy_fraction" in numbers
    rows = (tmp_path / "plots/abilities.csv").read_text().splitlines()
    assert rows[0] == "ability,condition,at,value,low,high,n"
    assert len(rows) == 1 + 2 * 9 + 2 * 9 + 2 * 7 + 3 * 6
    page = (tmp_path / "index.html").read_text()
    assert block["semantic_mixing"]["sentence"].split(":")[0] in page
    assert "Not measured: the model reads no text." in page
    written = [path.name for path in (tmp_path / "audio").iterdir()] + [path.name for path in (tmp_path / "samples").iterdir()]
    shown = [name for name in written if name.startswith(("semantic-mixing", "drawn-semantic-mixing"))]
    assert len(shown) == 2 * (5 + 1 + 2)  # two items: players of sweep and control, and two strips
    assert all(name in page for name in shown)


@pytest.mark.parametrize("split", ["test", "train"])
def test_too_few_pairs_still_end_in_a_report(
    world: SyntheticDataset, evaluated: dict[str, bytes], tmp_path: Path, split: str
) -> None:
    """One test pair, or training pairs alone, and no gold pair: the page has pairs, samples and the reason, no metrics."""
    path = world.layout.pairs / "pairs.parquet"
    rows = read_table(path, PAIRS).to_pylist()
    table = world.layout.root / "empty.csv"
    table.write_text("kind,file,label,split,pair\n")
    kept = [row for row in rows if row["split"] == "train"] + [row for row in rows if row["split"] == "test"][: split == "test"]
    try:
        write_table(path, PAIRS, kept)
        config = CONFIG.model_copy(update={"ground_truth": "empty.csv", "cache_dir": str(world.layout.result_cache)})
        report = evaluate(config, OtherReports(world.layout.root, tmp_path), ColorGenerator(), NoOpTracker())
    finally:
        write_table(path, PAIRS, rows)
    report.check_balance()
    assert (report.n_in, report.n_ok) == (int(split == "test"), 0)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    count = 1 if split == "test" else 0
    assert found["too_few_to_judge"] == (
        f"too few to judge: {count} test pairs and 0 gold pairs, one of the two sets needs 2 or more"
    )
    assert found["too_few_to_judge"] in found["warnings"]
    assert not {"test", "gold", "memorisation"} & set(found)
    page = (tmp_path / "index.html").read_text()
    assert "too few to judge" in page
    assert page.count("generated from this sound") == (1 if split == "test" else 8)
    assert ("Training pairs (not evaluated" in page) == (split == "train")
