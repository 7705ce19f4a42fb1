"""Tests of the parent run: stages of one pipeline run, as separate processes, below one MLflow run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline_steps import tracking
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.offline_queue import all_queues
from pipeline_steps.tracking.client.pipeline_run import identity_tags
from pipeline_steps.tracking.client.uploader import sync
from tests.tracking.helpers import Config, FaultyProxy, Sqlite, runs

PARAMS = "ingest: {root: data/birds}\ntrain: {seed: 7}\n"
PARENT = "mlflow.parentRunId"


@pytest.fixture
def under_dvc(layout: ProjectPaths, monkeypatch: pytest.MonkeyPatch) -> ProjectPaths:
    """A project whose stages DVC runs."""
    monkeypatch.setenv("DVC_STAGE", "any")
    layout.params.write_text(PARAMS)
    return layout


def stage(layout: ProjectPaths, name: str, key: str | None = None) -> None:
    with tracking.run(name, layout, Config(), resume_key=key) as tracker:
        tracker.log_metrics({f"{name}/items": 1.0})
        tracker.log_image("samples/grid", np.zeros((4, 4, 3), np.uint8), step=3)
        if name == "evaluate":
            tracker.log_pipeline_metrics({"test": {"win_rate": 0.6, "win_rate_low": 0.55}})


def test_stages_are_below_a_run_named_by_data_set_seed_and_experiment(
    under_dvc: ProjectPaths, sqlite: Sqlite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "loud-lark")
    for name in ("pair", "train", "evaluate"):
        stage(under_dvc, name)
        assert sync(under_dvc) == {}
    found = {run.info.run_name: run for run in runs(sqlite())}
    assert set(found) == {"birds seed 7 loud-lark", "pair", "train", "evaluate"}
    parent = found.pop("birds seed 7 loud-lark")
    assert {run.data.tags[PARENT] for run in found.values()} == {parent.info.run_id}
    assert PARENT not in parent.data.tags
    assert parent.info.status == "FINISHED"
    # MLflow's tile shows the parameters of a run before its image: the parent has the images and no parameters.
    assert parent.data.params == {}
    assert len(sqlite().list_artifacts(parent.info.run_id, "images")) == 2  # one step, logged once, and its thumbnail
    assert all(not sqlite().list_artifacts(run.info.run_id, "images") for run in found.values())
    assert "params.yaml" in {item.path for item in sqlite().list_artifacts(parent.info.run_id)}
    assert parent.data.metrics == {"test/win_rate": 0.6, "test/win_rate_low": 0.55}
    assert {run.data.tags["dvc.exp.name"] for run in (parent, *found.values())} == {"loud-lark"}


def test_a_crashed_pipeline_goes_on_and_a_finished_one_does_not(under_dvc: ProjectPaths, sqlite: Sqlite) -> None:
    stage(under_dvc, "pair")
    with pytest.raises(RuntimeError), tracking.run("train", under_dvc, Config(), resume_key="k"):
        raise RuntimeError("crash")
    assert sync(under_dvc) == {}
    (parent,) = [run for run in runs(sqlite()) if PARENT not in run.data.tags]
    assert parent.info.status == "FAILED"
    stage(under_dvc, "train", "k")
    stage(under_dvc, "evaluate")
    stage(under_dvc, "evaluate")  # forced: a new run of the pipeline
    under_dvc.params.write_text(PARAMS.replace("7", "8"))
    stage(under_dvc, "pair")
    assert sync(under_dvc) == {}
    everything = runs(sqlite())
    parents = [run for run in everything if PARENT not in run.data.tags]
    below = [[run.info.run_name for run in everything if run.data.tags.get(PARENT) == each.info.run_id] for each in parents]
    assert [run.info.status for run in parents] == ["FINISHED"] * 3
    assert below == [["pair", "train", "evaluate"], ["evaluate"], ["pair"]]


def test_all_of_it_is_sent_once_when_the_server_loses_answers(under_dvc: ProjectPaths, server: FaultyProxy) -> None:
    for name in ("pair", "train", "evaluate"):
        stage(under_dvc, name)
    for path in ("runs/create", "runs/set-tag", "runs/log-batch", "runs/update"):
        server.inject("lose", times=1, path=path)
        assert sync(under_dvc)
    server.inject("")
    assert sync(under_dvc) == {}
    assert sync(under_dvc) == {}
    everything = runs(server.client(), os.environ["MLFLOW_EXPERIMENT_NAME"])
    parents = [run for run in everything if PARENT not in run.data.tags]
    assert len(parents) == 1
    assert sorted(run.info.run_name for run in everything if run not in parents) == ["evaluate", "pair", "train"]
    assert parents[0].data.metrics["test/win_rate"] == 0.6


def test_uploader_of_the_last_stage_ends_the_parent(
    under_dvc: ProjectPaths, sqlite: Sqlite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SONIFY_TRACKING", "strict")
    stage(under_dvc, "evaluate")
    (parent,) = [run for run in runs(sqlite()) if PARENT not in run.data.tags]
    assert (parent.info.status, parent.data.metrics["test/win_rate"]) == ("FINISHED", 0.6)
    assert sum(queue.unsent() for queue in all_queues(under_dvc)) == 0


def test_stage_by_hand_has_no_parent(layout: ProjectPaths, sqlite: Sqlite) -> None:
    layout.params.write_text(PARAMS)
    stage(layout, "evaluate")
    assert sync(layout) == {}
    assert [run.info.run_name for run in runs(sqlite())] == ["evaluate"]


def test_experiment_in_a_temporary_folder_is_tracked_in_the_project(under_dvc: ProjectPaths, sqlite: Sqlite) -> None:
    copy = under_dvc.root / ".dvc/tmp/exps/standalone/tmp123"
    (copy / ".dvc").mkdir(parents=True)
    (copy / "params.yaml").write_text(PARAMS)
    work = (
        "from tests.tracking.client.test_pipeline_run import stage; from pipeline_steps.core.project_paths import ProjectPaths"
    )
    root = str(Path(__file__).resolve().parents[3])
    code = f"import sys; sys.path.insert(0, {root!r}); {work}; stage(ProjectPaths(), 'pair')"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    assert not (copy / ".runs").exists()
    assert not (copy / "mlflow.db").exists()
    assert sync(under_dvc) == {}
    assert sorted(run.info.run_name for run in runs(sqlite())) == ["birds seed 7", "pair"]


def test_named_pools_give_the_data_set_the_names_of_their_folders(tmp_path: Path) -> None:
    pools = {"pictures": {"root": "/home/ann/holiday"}, "sounds": {"root": "field"}}
    assert identity_tags(ProjectPaths(tmp_path), {"ingest": {"pools": pools}})["dataset"] == "holiday + field"
    assert identity_tags(ProjectPaths(tmp_path), {"ingest": {"root": "data/demo"}})["dataset"] == "demo"
    assert identity_tags(ProjectPaths(tmp_path), {})["dataset"] == tmp_path.name
