"""The whole stage on a small world in which colours sound: a source that hears must win, one that is deaf must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from colour_world import CONFIG, Elsewhere, Painter, World, files

from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.evaluate.step import make
from pipeline_steps.tracking.tracker import NullTracker


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> World:
    return World(tmp_path_factory.mktemp("world"), assets)


@pytest.fixture(scope="module")
def evaluated(world: World) -> dict[str, bytes]:
    report = make(CONFIG, world.layout, Painter(), NullTracker())
    report.check_balance()
    assert report.n_in == 6 + 3
    return files(world.layout.reports)


def test_who_hears_wins_and_the_controls_do_not(evaluated: dict[str, bytes]) -> None:
    found = json.loads(evaluated["evaluation.json"])
    rows = found["test"]["rows"]
    assert rows["model"]["win_rate_augnet"]["value"] > 0.9
    assert rows["shuffled_audio"]["win_rate_augnet"]["value"] < 0.6
    assert rows["ground_truth"]["win_rate_augnet"]["value"] > 0.9
    assert rows["text_oracle"]["applicable"] is False
    assert found["test"]["too_small_to_rank"] is True
    assert found["gold"]["n_pairs"] == found["gold_seen"]["n_pairs"] == 3
    entry = rows["model"]["kid_augnet"]
    assert set(entry) >= {"value", "low", "high", "n", "clusters", "judge", "seed", "sample_rate_hz", "n_real"}
    assert found["retrieval"]["rows"]["pipeline"]["recall_at_10"]["value"] == 1.0  # three times six sounds, own class first
    assert found["sensitivity"]["gain_-12_db"]["value"] < found["sensitivity"]["other_sound"]["value"]
    assert any("independent sounds" in warning for warning in found["warnings"])


def test_the_report_is_whole_safe_and_the_same_twice(world: World, evaluated: dict[str, bytes]) -> None:
    page = evaluated["index.html"].decode()
    for attack in ("<script>", "<svg onload", "<b>ball</b>"):
        assert attack not in page
    assert "&lt;b&gt;ball&lt;/b&gt;" in page
    assert "{{7*7}}" in page
    for name in evaluated:
        if name.startswith(("samples/picture", "audio/")):
            assert f'src="{name}"' in page
    assert str(world.layout.root) not in page
    make(CONFIG, world.layout, Painter(), NullTracker())
    assert files(world.layout.reports) == evaluated


def test_a_deaf_model_is_found_out(world: World, evaluated: dict[str, bytes], tmp_path: Path) -> None:
    elsewhere = Elsewhere(world.layout.root, tmp_path)
    config = CONFIG.model_copy(update={"sensitivity_sounds": 0, "samples_per_sound": 8, "memo": str(world.layout.memo)})
    make(config, elsewhere, Painter(deaf=True), NullTracker())
    found = json.loads((tmp_path / "evaluation.json").read_text())["test"]["rows"]["model"]
    assert found["win_rate_augnet"]["value"] == pytest.approx(0.5, abs=0.02)
    assert found["ais_winrate_aisfx_augnet"]["value"] == pytest.approx(0.5, abs=0.02)


def test_a_judge_that_took_part_is_refused_or_flagged(world: World, evaluated: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match="augnet is of family augnet, which also took part in model"):
        make(CONFIG, world.layout, Painter(families=frozenset({"augnet"})), NullTracker())


def test_damaged_or_missing_inputs_are_named(world: World, evaluated: dict[str, bytes]) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv is missing"):
        make(CONFIG.model_copy(update={"gold": "nowhere.csv"}), world.layout, Painter(), NullTracker())
    path = world.layout.embeddings / "text.npy"
    kept = path.read_bytes()
    path.write_bytes(kept[:-4] + b"\0\0\0\1")
    try:
        with pytest.raises(IntegrityError, match=r"text\.npy: not the bytes"):
            make(CONFIG, world.layout, Painter(), NullTracker())
    finally:
        path.write_bytes(kept)
