"""Tests of model logging: serving, one version per run, metrics attached by content."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from pipeline_steps import tracking
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.model_logging import REGISTERED_MODEL
from pipeline_steps.tracking.client.offline_queue import all_queues
from pipeline_steps.tracking.client.pyfunc_model import decode_audio
from pipeline_steps.tracking.client.uploader import sync
from pipeline_steps.tracking.errors import StoreUnavailableError
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from tests.tracking.helpers import Config, FaultyProxy, Sqlite, runs, single_run

PROJECT = Path(__file__).resolve().parents[3]


def encoded(samples: np.ndarray, rate: int = 48_000, kind: str = "WAV", subtype: str = "PCM_16") -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def tone() -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)).astype(np.float32)


def register(layout: ProjectPaths, model: Path) -> None:
    with tracking.run("train", layout, Config()) as tracker:
        tracker.log_model(model)


def test_served_model_generates_the_images_of_the_pipeline(
    layout: ProjectPaths, sqlite: Sqlite, exported_model: Path, tone: np.ndarray, tmp_path: Path
) -> None:
    import mlflow
    import pandas

    from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline

    register(layout, exported_model)
    assert sync(layout) == {}
    client = sqlite()
    version = client.get_model_version_by_alias(REGISTERED_MODEL, "challenger")
    assert version.tags["dvc.md5"] == hash_path(exported_model)
    assert version.run_id == single_run(client).info.run_id

    uri = f"models:/{REGISTERED_MODEL}@challenger"
    database = f"sqlite:///{(layout.root / 'mlflow.db').resolve()}"
    mlflow.set_tracking_uri(database)
    served = mlflow.pyfunc.load_model(uri)
    clip = encoded(tone)
    answer = served.predict(pandas.DataFrame({"audio_base64": [clip]}), params={"num_samples": 2, "seed": 5})
    with Image.open(io.BytesIO(base64.b64decode(answer["png_base64"][0]))) as image:
        generated = np.asarray(image)
    expected = AutoAudio2ImagePipeline.from_pretrained(exported_model)(decode_audio(clip), num_samples=2, seed=5)
    assert generated.shape == (32, 64, 3)
    assert np.abs(generated.astype(int) - np.concatenate(list(expected), axis=1)).max() <= 1
    with pytest.raises(ValueError, match="num_samples must be"):
        served.predict(pandas.DataFrame({"audio_base64": [clip]}), params={"num_samples": 99})

    # The same with MLflow's command, in a process without this project on its path.
    request = tmp_path / "request.json"
    request.write_text(
        json.dumps(
            {"dataframe_split": {"columns": ["audio_base64"], "data": [[clip]]}, "params": {"num_samples": 2, "seed": 5}}
        )
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"MLFLOW_TRACKING_URI": database}
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "models",
        "predict",
        "-m",
        uri,
        "-i",
        str(request),
        "-o",
        str(tmp_path / "out.json"),
    ]
    subprocess.run([*command, "-t", "json", "--env-manager", "local"], env=environment, cwd=tmp_path, check=True)
    (row,) = json.loads((tmp_path / "out.json").read_text())["predictions"]
    assert row["png_base64"] == answer["png_base64"][0]


def test_each_run_is_one_version_and_the_newest_is_challenger(
    layout: ProjectPaths, sqlite: Sqlite, exported_model: Path
) -> None:
    register(layout, exported_model)
    register(layout, exported_model)
    assert sync(layout) == {}
    assert sync(layout) == {}
    client = sqlite()
    versions = client.search_model_versions(f"name = '{REGISTERED_MODEL}'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert client.get_model_version_by_alias(REGISTERED_MODEL, "challenger").version == 2


def test_metrics_wait_until_their_model_is_uploaded(layout: ProjectPaths, sqlite: Sqlite, exported_model: Path) -> None:
    register(layout, exported_model)
    with tracking.run("evaluate", layout, Config()) as tracker:
        tracker.log_model_metrics(exported_model, {"win_rate": 0.7})
    (layout.root / "mlartifacts").write_text("the artifact store is unavailable")
    problems = sync(layout)
    assert "is still in queue train-" in problems[next(key for key in problems if key.startswith("evaluate"))]
    (layout.root / "mlartifacts").unlink()
    assert sync(layout) == {}
    version = sqlite().get_model_version_by_alias(REGISTERED_MODEL, "challenger")
    model = sqlite().get_logged_model(version.source.removeprefix("models:/"))
    assert [(metric.key, metric.value) for metric in model.metrics] == [("win_rate", 0.7)]
    assert {queue.state().rejected for queue in all_queues(layout)} == {0}


def test_older_model_uploaded_later_is_not_challenger(
    layout: ProjectPaths, sqlite: Sqlite, exported_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline_steps.tracking.client import model_logging

    register(layout, exported_model)
    (older,) = all_queues(layout)
    time.sleep(0.01)
    register(layout, exported_model)
    real = model_logging._upload_model

    def upload(store: Any, run: Any, tags: dict[str, str], copy: Path) -> Any:
        if tags[model_logging.ENTRY_TAG].startswith(older.key):
            raise StoreUnavailableError("ReadTimeout")
        return real(store, run, tags, copy)

    with monkeypatch.context() as patch:
        patch.setattr(model_logging, "_upload_model", upload)
        assert list(sync(layout)) == [older.key]
    assert sync(layout) == {}
    client = sqlite()
    newer, late = (client.get_model_version(REGISTERED_MODEL, number) for number in ("1", "2"))
    assert late.run_id == older.state().run_id
    assert client.get_model_version_by_alias(REGISTERED_MODEL, "challenger").version == newer.version


@pytest.mark.parametrize("kind", ["refuse", "lose"])
def test_interrupted_upload_leaves_one_ready_model(
    layout: ProjectPaths, server: FaultyProxy, exported_model: Path, kind: str
) -> None:
    from mlflow.entities import LoggedModelStatus

    register(layout, exported_model)
    server.inject(kind, times=4, path="logged-models")
    for _ in range(6):  # more often than faults are injected
        problems = sync(layout)
    assert problems == {}
    client = server.client()
    (run,) = runs(client, os.environ["MLFLOW_EXPERIMENT_NAME"])
    models = client.search_logged_models([run.info.experiment_id])
    assert [model.status for model in models].count(LoggedModelStatus.READY) == 1
    assert {model.status for model in models} <= {LoggedModelStatus.READY, LoggedModelStatus.FAILED}
    assert len(client.search_model_versions(f"run_id = '{run.info.run_id}'")) == 1


def test_changed_copy_is_not_registered(layout: ProjectPaths, sqlite: Sqlite, exported_model: Path) -> None:
    register(layout, exported_model)
    (queue,) = all_queues(layout)
    (copy,) = (queue.folder / "files").glob("*/model/model_index.json")
    text = copy.read_text()
    copy.unlink()  # a hard link: writing would change the original
    copy.write_text(text.replace("guidance_scale", "guidance_scald"))
    assert sync(layout) == {}
    client = sqlite()
    assert not client.search_registered_models()
    assert "has changed since" in (queue.folder / "rejected.jsonl").read_text()


def test_metrics_are_attached_to_the_model_with_the_same_bytes(
    layout: ProjectPaths, sqlite: Sqlite, exported_model: Path
) -> None:
    register(layout, exported_model)
    with tracking.run("evaluate", layout, Config(), inputs=[layout.pairs]) as tracker:
        tracker.log_model_metrics(exported_model, {"win_rate": {"value": 0.7}}, dataset=layout.pairs)
    assert sync(layout) == {}
    client = sqlite()
    version = client.get_model_version_by_alias(REGISTERED_MODEL, "challenger")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    (metric,) = model.metrics
    assert (metric.key, metric.value) == ("win_rate/value", 0.7)
    assert (metric.dataset_name, metric.dataset_digest) == ("data/pairs", hash_path(layout.pairs))


def test_metrics_of_an_unlogged_model_are_rejected(layout: ProjectPaths, sqlite: Sqlite, exported_model: Path) -> None:
    with tracking.run("evaluate", layout, Config()) as tracker:
        tracker.log_model_metrics(exported_model, {"win_rate": 0.7})
    assert sync(layout) == {}
    (queue,) = all_queues(layout)
    assert "trained without tracking" in (queue.folder / "rejected.jsonl").read_text()
    assert single_run(sqlite()).info.status == "FINISHED"


def test_audio_of_any_rate_and_channels_is_decoded(tone: np.ndarray) -> None:
    stereo = np.stack([tone, tone], axis=1)[:44_100]
    assert decode_audio(encoded(stereo, 44_100, "FLAC")).shape == (48_000,)
    long = np.zeros(8_000 * 40, np.float32)
    assert decode_audio(encoded(long, 8_000)).shape == (48_000 * 30,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no base64!", "not base64"),
        (base64.b64encode(b"<html></html>").decode(), "cannot be decoded"),
        ("", "cannot be decoded"),
        (encoded(np.full(4800, np.nan, np.float32), subtype="FLOAT"), "NaN"),
        (encoded(np.zeros(0, np.float32)), "empty"),
        (encoded(np.zeros(480, np.float32), kind="W64"), "not accepted"),
    ],
)
def test_invalid_audio_is_refused_with_a_reason(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_audio(text)


def test_moved_project_keeps_its_artifacts_and_a_copy_leaves_the_original_alone(
    layout: ProjectPaths, sqlite: Sqlite, exported_model: Path, tmp_path: Path
) -> None:
    import mlflow
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    from pipeline_steps.tracking.registry.model_comparison import fetch_model
    from pipeline_steps.tracking.registry.model_registry import ModelRegistry

    with tracking.run("train", layout, Config()) as tracker:
        tracker.log_model(exported_model)
        tracker.log_artifact(layout.pairs / "pairs.txt")
    assert sync(layout) == {}
    with tracking.run("pair", layout, Config()) as tracker:  # not sent when the folder is copied
        tracker.log_metrics({"pair/pairs": 3.0})
    copy = ProjectPaths(tmp_path / "50%_copy")
    shutil.copytree(layout.root, copy.root)
    before = sorted(path.relative_to(layout.root) for path in layout.root.rglob("*"))
    _artifact_repos_cache.clear()  # MLflow keeps the addresses of runs in a process; a copy is used by another process
    registry = ModelRegistry(copy)
    gone = tmp_path / "gone"
    shutil.move(layout.root, gone)  # nothing is read from the original
    info = registry.resolve("challenger")
    local = registry.client.download_artifacts(info.run_id, "pairs.txt", str(tmp_path))
    assert Path(local).read_text() == "pairs"
    assert hash_path(fetch_model(copy, info, tmp_path / "fetched")) == info.md5
    register(copy, exported_model)
    assert sync(copy) == {}
    assert not layout.root.exists()
    assert sorted(path.relative_to(gone) for path in gone.rglob("*")) == before
    (experiment,) = registry.client.search_experiments(filter_string="name = 'seeing-sound'")
    assert experiment.artifact_location == (copy.root / "mlartifacts").resolve().as_uri()
    served = mlflow.MlflowClient(registry.settings.uri).get_model_version_by_alias(REGISTERED_MODEL, "challenger")
    assert str(served.version) == "2"


def test_version_carries_its_evaluation(layout: ProjectPaths, sqlite: Sqlite, exported_model: Path) -> None:
    layout.params.write_text("ingest: {root: data/birds}\ntrain: {seed: 7}\n")
    register(layout, exported_model)
    values = {"test": {"win_rate": 0.52, "win_rate_low": 0.45, "win_rate_high": 0.61, "clips": 13}}
    with tracking.run("evaluate", layout, Config()) as tracker:
        tracker.log_model_metrics(exported_model, values, layout.pairs, ["test: the win rate is not above chance"])
    assert sync(layout) == {}
    client = sqlite()
    version = client.get_model_version_by_alias(REGISTERED_MODEL, "challenger")
    assert "**Warning**: test: the win rate is not above chance" in version.description
    assert "- test/win_rate 0.52 [0.45, 0.61]" in version.description
    evaluation = next(run for run in runs(client) if run.info.run_name == "evaluate")
    assert f"/runs/{evaluation.info.run_id}/artifacts" in version.description
    assert {"dataset": "birds", "seed": "7", "evaluation": "not above chance"}.items() <= version.tags.items()
    assert len(version.tags) <= 8
    logged = {metric.key: metric.value for metric in client.get_logged_model(version.source.removeprefix("models:/")).metrics}
    assert logged == {"test/win_rate": 0.52, "test/win_rate_low": 0.45, "test/win_rate_high": 0.61, "test/clips": 13.0}
    # The registry's page that compares versions shows the metrics of the training runs.
    assert client.get_run(version.run_id).data.metrics["test/win_rate"] == 0.52
