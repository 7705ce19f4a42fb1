"""Check of int8: its measure, and the decision of the stage."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline_steps.core.l2_normalize import l2_normalize
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.embed.config import EmbedConfig
from pipeline_steps.embed.int8_check import MAX_CLIPS, MIN_CLIPS, calibration_sample, neighbor_agreement
from pipeline_steps.embed.stage import run
from tests.factories.catalog import bytes_below, write_catalog
from tests.factories.checkpoints.clap import clap_checkpoint
from tests.factories.events import write_events
from tests.factories.ray_cluster import driver, finished

RUN = """
import json, sys
from pathlib import Path
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.embed.stage import EmbedConfig, run
report = run(EmbedConfig.from_params(json.loads(sys.argv[1])), ProjectPaths(Path.cwd()))
print(json.dumps([report.cache_misses, report.metrics["int8"]]))
"""
"""Runs in a process of its own, because another test may have imported Ray without a token."""
RANDOM = np.random.default_rng(0)
ROWS = l2_normalize(RANDOM.standard_normal((200, 16)).astype(np.float32))


def test_equal_vectors_have_recall_one() -> None:
    found = neighbor_agreement(ROWS, ROWS.copy())
    assert (found["sounds"], found["recall_at_10"], found["shared_at_10"]) == (200, 1.0, 1.0)
    assert found["cosine_min"] == pytest.approx(1.0, abs=1e-6)


def test_noise_reduces_recall_gradually() -> None:
    noise = RANDOM.standard_normal(ROWS.shape).astype(np.float32)
    found = [neighbor_agreement(ROWS, l2_normalize(ROWS + size * noise)) for size in (0.01, 0.1, 1.0)]
    for name in ("recall_at_10", "shared_at_10", "cosine_mean", "cosine_min"):
        values = [row[name] for row in found]
        assert values == sorted(values, reverse=True)
    assert found[0]["recall_at_10"] == 1.0
    assert found[2]["recall_at_10"] < 0.7


def test_a_common_rotation_is_detected() -> None:
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0].astype(np.float32)
    turned = ROWS @ turn
    np.testing.assert_allclose(turned @ turned.T, ROWS @ ROWS.T, atol=1e-5)  # similarities among the rows are unchanged
    assert neighbor_agreement(ROWS, turned)["recall_at_10"] < 0.5


def test_the_sample_is_stable_under_a_new_clip() -> None:
    ids = [f"{number:032x}" for number in RANDOM.permutation(1000)]
    chosen = calibration_sample(ids)
    assert len(chosen) == MAX_CLIPS
    assert calibration_sample(ids[::-1]) == chosen
    assert len(set(calibration_sample([*ids, "0" * 31 + "g"])) - set(chosen)) <= 1
    assert calibration_sample(ids[:3]) == sorted(ids[:3])


def pool(layout: ProjectPaths, demo: Path, assets: Path, count: int) -> None:
    """Write a catalog of the first `count` demo clips."""
    names = sorted(path.stem.removeprefix("s-") for path in (demo / "sounds").glob("*.ogg"))[:count]
    assert len(names) == count
    write_catalog(layout, demo, ["dog-000"], names, assets=assets)


def settings(cache_dir: Path, floor: float = 0.99, backend: str = "openvino-int8", **engine: Any) -> EmbedConfig:
    clap = {"model": "checkpoint", "backend": backend, "min_int8_recall": floor}
    return EmbedConfig.from_params({"encoder": "clap", "clap": clap, "cache_dir": str(cache_dir), **engine})


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory, demo: Path, assets: Path) -> ProjectPaths:
    pytest.importorskip("nncf")
    made = ProjectPaths(tmp_path_factory.mktemp("int8"))
    pool(made, demo, assets, MIN_CLIPS)
    write_events(made, {"a" * 32: "a dog barking"})
    clap_checkpoint(made.root / "checkpoint")
    return made


@pytest.mark.full
def test_int8_is_used_if_its_recall_reaches_the_floor_else_float32(
    layout: ProjectPaths, demo: Path, assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_dir = tmp_path / "memo"
    with caplog.at_level(logging.INFO):
        passed = run(settings(cache_dir, floor=0.0), layout)
    assert "int8 is used: recall@10" in caplog.text
    figures = passed.metrics["int8"]
    assert (figures["used"], figures["sounds"], figures["floor"]) == (True, MIN_CLIPS, 0.0)
    assert 0 < figures["recall_at_10"] < 0.99, "a network of random weights hardly separates clips"
    assert figures["cosine_mean"] > 0.999
    assert (passed.cache_misses, passed.cache_hits) == (MIN_CLIPS + 1, 0)
    quick = bytes_below(layout.embeddings)
    assert json.loads(quick["meta.json"])["parameters"]["backend"] == "openvino-int8"

    again = run(settings(cache_dir, floor=0.0), layout)
    assert (again.cache_misses, again.cache_hits, again.metrics["int8"]) == (0, MIN_CLIPS + 1, figures)
    assert bytes_below(layout.embeddings) == quick

    caplog.clear()
    refused = run(settings(cache_dir), layout)
    assert "int8 is not used, float32 is: recall@10" in caplog.text
    assert refused.metrics["int8"] == {**figures, "used": False, "floor": 0.99, "reason": "recall is below the floor"}
    exact = bytes_below(layout.embeddings)
    assert exact["audio.npy"] != quick["audio.npy"]
    assert exact["text.npy"] == quick["text.npy"]
    plain = run(settings(tmp_path / "other", backend="openvino"), layout)
    assert bytes_below(layout.embeddings) == exact, "as without int8"
    assert "int8" not in plain.metrics

    pool(layout, demo, assets, MIN_CLIPS + 1)
    grown = run(settings(cache_dir, floor=0.0), layout)
    assert (grown.cache_misses, grown.metrics["int8"]["sounds"]) == (1, MIN_CLIPS + 1), "one more clip needs one more vector"
    parts = list((cache_dir / "embed-int8").rglob("*.parquet"))
    assert len(parts) == 1, "the network was quantized once"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_actors_of_a_cluster_use_one_network(layout: ProjectPaths, demo: Path, assets: Path, tmp_path: Path) -> None:
    pool(layout, demo, assets, MIN_CLIPS)
    figures = run(settings(tmp_path / "local", floor=0.0), layout).metrics["int8"]
    made = bytes_below(layout.embeddings)
    shutil.rmtree(layout.embeddings)
    spread = settings(tmp_path / "spread", floor=0.0, executor="ray", ray={"min_actors": 2, "max_actors": 2})
    answer = finished(driver(["-c", RUN, spread.model_dump_json()], layout.root)).splitlines()[-1]
    assert json.loads(answer) == [MIN_CLIPS + 1, figures]
    assert bytes_below(layout.embeddings) == made
    assert len(list((tmp_path / "spread/embed-int8").rglob("*.parquet"))) == 1, "the network was quantized once"


def test_a_pool_too_small_to_compare_is_embedded_in_float32(
    layout: ProjectPaths, demo: Path, assets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool(layout, demo, assets, 3)
    report = run(settings(tmp_path / "memo", floor=0.0), layout)
    assert "3 clips are too few" in caplog.text
    assert report.metrics["int8"] == {"used": False, "reason": "fewer than 40 clips to compare", "floor": 0.0, "sounds": 3}
    assert json.loads((layout.embeddings / "meta.json").read_text())["parameters"]["backend"] == "openvino"
    assert not (tmp_path / "memo/embed-int8").exists()
