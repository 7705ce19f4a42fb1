"""caption and embed with `engine: ray` on two raylets that lose an actor and a node: the outs of `engine: local`."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from pipeline_steps.__main__ import main
from pipeline_steps.core.project_paths import ProjectPaths
from tests.factories.catalog import bytes_below, write_catalog
from tests.factories.ray_cluster import Cluster, driver, finished, kill_tree, two_raylets, wait_for

PICTURES = ["bison-000", "electric-guitar-000", "hammer-000", "apple-green-000", "banana-000", "binoculars-000", "dog-000"]
SOUNDS = ["dog-003", "sheep-000", "train-000", "trumpet-000"]
BATCH = 1

pytestmark = [pytest.mark.full, pytest.mark.fault, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_raylets(tmp_path_factory.getbasetemp().parent / "ray.lock") as made:
        yield made


def make_project(folder: Path, project: Path, demo: Path, assets: Path, **engine: Any) -> ProjectPaths:
    """Catalog, media, weights, and the production parameters with this engine."""
    layout = ProjectPaths(folder)
    write_catalog(layout, demo, PICTURES, SOUNDS, assets=assets)
    params = YAML(typ="safe").load((project / "params.yaml").read_text())
    for stage in ("caption", "embed"):
        params["caption"]["tagger"]["crops"] = ["crop", "pad", "stretch"]  # three times the work: long enough to be disturbed
        params[stage] |= {"batch_size": BATCH, **copy.deepcopy(engine)}  # one object twice would be a YAML alias
    YAML(typ="safe").dump(params, layout.params)
    return layout


def report(layout: ProjectPaths, stage: str) -> dict[str, Any]:
    return {**json.loads(layout.report(stage).read_text()), **json.loads(layout.runtime(stage).read_text())}


def actors() -> list[int]:
    """Processes that Ray calls workers of a map over our actor."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "MapBatches(RayWorker)" in " ".join(process.info["cmdline"] or [])
    ]


def parts(layout: ProjectPaths, stage: str) -> list[Path]:
    return list(layout.result_cache.glob(f"{stage}/*/*.parquet"))


def test_outs_of_a_cluster_are_those_of_this_process(
    cluster: Cluster, tmp_path: Path, project: Path, demo: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_project(tmp_path / "local", project, demo, assets)
    monkeypatch.chdir(local.root)
    assert [main([stage]) for stage in ("caption", "embed")] == [0, 0]

    ray = {"address": cluster.address, "min_actors": 2, "max_actors": 2, "no_progress_timeout_seconds": 120.0}
    spread = make_project(tmp_path / "spread", project, demo, assets, executor="ray", ray=ray)
    running = driver(["-m", "pipeline_steps", "caption"], spread.root)
    wait_for(lambda: len(actors()) == 2 or running.poll() is not None)
    victim, _ = actors()
    wait_for(lambda: parts(spread, "caption") or running.poll() is not None, every=0.01)
    assert len(parts(spread, "caption")) < len(PICTURES), "killed in mid-run"
    os.kill(victim, signal.SIGKILL)
    assert f"{len(PICTURES)} cache misses, 0 cache hits" in finished(running)
    assert bytes_below(spread.captions) == bytes_below(local.captions)
    rows = sum(pq.read_metadata(part).num_rows for part in parts(spread, "caption"))
    assert rows == len(PICTURES), "what was done twice gave the same part"

    shutil.copytree(local.result_cache / "embed-tags", spread.result_cache / "embed-tags")  # half the time
    running = driver(["-m", "pipeline_steps", "embed"], spread.root)
    wait_for(lambda: actors() or running.poll() is not None)
    assert running.poll() is None, "a node is lost in mid-run"
    kill_tree(cluster.nodes[1])
    finished(running)
    assert bytes_below(spread.embeddings) == bytes_below(local.embeddings)
    counts = ("n_in", "n_ok", "n_quarantined", "cache_misses", "cache_hits", "sounds", "texts")
    assert [report(spread, "embed")[key] for key in counts] == [report(local, "embed")[key] for key in counts]

    for folder in (spread.captions, spread.embeddings):
        shutil.rmtree(folder)
    monkeypatch.chdir(spread.root)
    assert [main([stage]) for stage in ("caption", "embed")] == [0, 0]
    assert [report(spread, stage)["cache_misses"] for stage in ("caption", "embed")] == [0, 0], "the memo has it all"
    assert bytes_below(spread.embeddings) == bytes_below(local.embeddings)


def test_a_cluster_that_is_away_is_a_service_that_is_away(
    tmp_path: Path, project: Path, demo: Path, assets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = make_project(tmp_path, project, demo, assets, executor="ray", ray={"address": "127.0.0.1:9"})
    monkeypatch.chdir(layout.root)
    assert main(["caption"]) == 5
    error = json.loads((tmp_path / "error.json").read_text())
    assert (error["kind"], error["transient"]) == ("service", True)
    assert "no Ray cluster at '127.0.0.1:9'" in capsys.readouterr().err
