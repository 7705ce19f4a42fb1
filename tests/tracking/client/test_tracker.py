"""Tests of the tracker and the uploader: every entry is stored once, also after crashes and outages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from pipeline_steps import tracking
from pipeline_steps.core.errors import ConfigError, ServiceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.offline_queue import OfflineQueue, all_queues
from pipeline_steps.tracking.client.uploader import sync
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from tests.tracking.helpers import Config, FaultyProxy, Sqlite, run_training, runs, single_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def steps(client: MlflowClient, run: Run, key: str = "train/loss") -> list[int]:
    return [metric.step for metric in client.get_metric_history(run.info.run_id, key)]


def interrupted_training(layout: ProjectPaths) -> None:
    """A training run that is interrupted after its first step."""
    with tracking.run("train", layout, Config(), resume_key="abc") as tracker:
        tracker.log_metrics({"train/loss": 1.0}, step=0)
        raise KeyboardInterrupt


def test_entries_are_uploaded_to_sqlite_by_the_child_process(
    layout: ProjectPaths, sqlite: Sqlite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SONIFY_TRACKING", "on")
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    image = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    with tracking.run("train", layout, Config(api_key="hunter22"), inputs=[layout.pairs]) as tracker:
        tracker.log_tags({"where": "http://me:pw@host/hf_verysecret"})
        tracker.log_metrics({"train/loss": 0.5, "loss%": 1, "bad": float("nan"), "worse": float("inf"), "text": "no"}, step=3)
        tracker.log_image("samples/grid", image, step=3)
        tracker.log_audio("test/dog", np.zeros(4800, np.float32), 48_000)
        tracker.log_artifact(layout.pairs, "data")
    client = sqlite()
    run = single_run(client)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"learning_rate": "0.001", "batch_size": "48", "api_key": "***"}
    assert {key: value for key, value in run.data.metrics.items() if not key.startswith("system/")} == {
        "train/loss": 0.5,
        "loss_": 1.0,
    }
    assert run.data.tags["where"] == "http://***@host/***"
    assert run.data.tags["metrics.dropped_nonfinite"] == "2"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.source_type) == ("data/pairs", "dvc")
    assert data.dataset.digest == hash_path(layout.pairs)
    artifacts = layout.root / "mlartifacts" / run.info.run_id / "artifacts"
    names = {path.relative_to(artifacts).as_posix().split("+timestamp")[0] for path in artifacts.rglob("*") if path.is_file()}
    assert names == {"images/samples~grid+step+3", "audio/test/dog.wav", "data/pairs/pairs.txt"}
    queue = next(all_queues(layout))
    assert not queue.entries_file.exists(), "a finished, uploaded run leaves no copies"
    written = b"".join(path.read_bytes() for path in layout.root.rglob("*") if path.is_file())
    for secret in (b"hunter22", b"hf_verysecret", b"me:pw"):
        assert secret not in written


def test_mode_off_writes_nothing(layout: ProjectPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SONIFY_TRACKING", "off")
    before = sorted(layout.root.rglob("*"))
    run_training(layout)
    assert sorted(layout.root.rglob("*")) == before


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "mlruns", "/tmp/mlruns"])
def test_file_stores_are_refused(layout: ProjectPaths, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match=r"file store.*sqlite:///"):
        run_training(layout)


@pytest.mark.parametrize(("name", "value"), [("SONIFY_TRACKING", "maybe"), ("SONIFY_TRACKING_DEADLINE", "soon")])
def test_invalid_variables_are_named(layout: ProjectPaths, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}='{value}'"):
        run_training(layout)


def test_sync_uploads_without_duplicates(layout: ProjectPaths, sqlite: Sqlite) -> None:
    run_training(layout)
    assert sync(layout) == {}
    assert sync(layout) == {}
    client = sqlite()
    assert steps(client, single_run(client)) == list(range(20))


def test_interrupted_run_is_resumed_and_finished_run_is_not(layout: ProjectPaths, sqlite: Sqlite) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_training(layout)
    assert sync(layout) == {}
    client = sqlite()
    assert single_run(client).info.status == "KILLED"
    run_training(layout, count=2, first=1, config=Config(batch_size=64))
    assert sync(layout) == {}
    run = single_run(client)
    assert run.info.status == "FINISHED"
    assert steps(client, run) == [0, 1, 2]
    assert run.data.params["batch_size"] == "48"
    assert run.data.tags["param_changed.batch_size"] == "64"
    run_training(layout, count=1)
    assert sync(layout) == {}
    assert len(runs(client)) == 2


def test_killed_run_is_resumed_as_the_same_run(layout: ProjectPaths, sqlite: Sqlite, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from pipeline_steps import tracking\n"
        "from pipeline_steps.core.project_paths import ProjectPaths\n"
        "from pipeline_steps.core.config import StageConfig\n"
        "with tracking.run('train', ProjectPaths(Path()), StageConfig(), resume_key='k') as tracker:\n"
        "    for step in range(10): tracker.log_metrics({'train/loss': 1.0}, step=step)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], cwd=layout.root, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (queue,) = all_queues(layout)
    with queue.entries_file.open("ab") as handle:
        handle.write(b'{"kind": "metrics", "values": {"tor')  # a partial line
    with tracking.run("train", layout, Config(), resume_key="k") as tracker:
        for step in range(6, 15):  # resumed from a checkpoint at step 5: steps 6 to 9 are logged again
            tracker.log_metrics({"train/loss": 1.0}, step=step)
    assert sync(layout) == {}
    client = sqlite()
    assert steps(client, single_run(client)) == list(range(15))


def test_rejected_entry_does_not_block_the_others(layout: ProjectPaths, sqlite: Sqlite) -> None:
    with tracking.run("pair", layout, Config()) as tracker:
        tracker.log_tags({"fine": "yes"})
        tracker.log_input("data/pairs", "x" * 40, "data/pairs", "pair")  # longer than MLflow's 36 characters
        tracker.log_metrics({"pairs": 3})
    assert sync(layout) == {}
    run = single_run(sqlite())
    assert run.info.status == "FINISHED"
    assert run.data.metrics["pairs"] == 3
    (queue,) = all_queues(layout)
    assert queue.state().rejected == 1
    assert "36" in json.loads((queue.folder / "rejected.jsonl").read_text())["reason"]


def test_write_error_does_not_stop_the_stage(
    layout: ProjectPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: OfflineQueue, kind: str, **values: object) -> None:
        raise OSError(28, "No space left on device")

    with tracking.run("train", layout, Config()) as tracker:
        monkeypatch.setattr(OfflineQueue, "append", full)
        tracker.log_metrics({"train/loss": 1.0})
    assert "No space left on device" in caplog.text


FULL = """
import resource, sys
from pathlib import Path
from pipeline_steps.tracking.client.offline_queue import OfflineQueue
queue = OfflineQueue(Path(sys.argv[1]))
queue.append("metrics", values={"loss": 1.0}, step=1)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (queue.entries_file.stat().st_size + 20, hard))
try:
    queue.append("metrics", values={"loss": 0.5}, step=2)
except OSError:
    print("full")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
queue.append("metrics", values={"loss": 0.4}, step=3)
"""


def test_full_disk_leaves_no_partial_line(tmp_path: Path) -> None:
    """A limit on the file size interrupts a write like a full disk."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout == "full\n"
    assert [entry["step"] for entry, _ in OfflineQueue(tmp_path).read(0)] == [1, 3]


def test_damaged_line_is_rejected(layout: ProjectPaths, sqlite: Sqlite) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_training(layout)
    (queue,) = all_queues(layout)
    with queue.entries_file.open("ab") as handle:
        handle.write(b'{"kind": "metrics", "valu\xc3{"kind": "metrics"}\n7\n')
    run_training(layout, count=2, first=1)
    assert sync(layout) == {}
    client = sqlite()
    assert steps(client, single_run(client)) == [0, 1, 2]
    assert queue.state().rejected == 2
    assert "is not an entry" in (queue.folder / "rejected.jsonl").read_text()


def test_stopped_server_gives_one_warning_and_sync_uploads_later(
    layout: ProjectPaths,
    sqlite: Sqlite,
    dead_port: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    clock: Callable[[], float],
) -> None:
    monkeypatch.setenv("SONIFY_TRACKING", "on")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{dead_port}")
    run_training(layout)
    assert clock() < 15, "a refused connection is detected immediately"
    output = capfd.readouterr().err
    assert output.count("not sent") == 1
    assert "sonify sync" in output
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert sync(layout) == {}
    client = sqlite()
    assert steps(client, single_run(client)) == list(range(20))


def test_hanging_server_is_abandoned_at_the_deadline(
    layout: ProjectPaths, server: FaultyProxy, monkeypatch: pytest.MonkeyPatch, clock: Callable[[], float]
) -> None:
    server.inject("hang")
    monkeypatch.setenv("SONIFY_TRACKING", "on")
    monkeypatch.setenv("SONIFY_TRACKING_DEADLINE", "2")
    run_training(layout)
    assert clock() < 12
    assert next(all_queues(layout)).unsent() > 20


def test_strict_mode_exits_with_5(layout: ProjectPaths, dead_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SONIFY_TRACKING", "strict")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{dead_port}")
    with pytest.raises(ServiceError) as caught:
        run_training(layout)
    assert caught.value.exit_code == 5


def test_failing_mlflow_import_does_not_stop_the_stage(
    layout: ProjectPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/mlflow.py").write_text("raise ImportError('broken install')")
    monkeypatch.setenv("SONIFY_TRACKING", "on")
    monkeypatch.setattr(
        "pipeline_steps.tracking.client.tracker.child_environment",
        lambda settings: {**os.environ, "PYTHONPATH": f"{tmp_path / 'broken'}:{Path(__file__).parents[3]}"},
    )
    run_training(layout)
    assert "broken install" in next(all_queues(layout)).state().problem


@pytest.mark.parametrize("kind", ["refuse", "lose"])
def test_server_errors_neither_lose_nor_duplicate_entries(layout: ProjectPaths, server: FaultyProxy, kind: str) -> None:
    """Status 500 before or after the request was processed, three times per kind of request."""
    for path in ("runs/create", "runs/log-batch", "runs/log-inputs", "runs/update"):
        server.inject(kind, times=3, path=path)
        run_training(layout, count=5, resume_key=f"{kind}{path.replace('/', '')}")
        for _ in range(4):
            if not sync(layout):
                break
        assert sync(layout) == {}
    client = server.client()
    found = runs(client, os.environ["MLFLOW_EXPERIMENT_NAME"])
    assert len(found) == 4
    for run in found:
        assert steps(client, run) == list(range(5))
        assert len(run.inputs.dataset_inputs) == 1
        assert run.info.status == "FINISHED"


def test_run_deleted_in_mlflow_is_created_again(layout: ProjectPaths, sqlite: Sqlite) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_training(layout)
    sync(layout)
    client = sqlite()
    client.delete_run(single_run(client).info.run_id)
    run_training(layout, count=2, first=1)
    assert sync(layout) == {}
    assert steps(client, single_run(client)) == [0, 1, 2]
