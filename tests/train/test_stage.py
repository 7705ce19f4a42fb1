"""Stage `train`: outputs, resumption after interruptions, rejected inputs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_steps.__main__ import main
from pipeline_steps.core.checksums import NAME
from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError, ResourceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import AUDIO
from pipeline_steps.core.tables import write_table
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.train import stage
from pipeline_steps.train.audio_feature_cache import build_tokenizer
from pipeline_steps.train.data import TrainingBatch
from pipeline_steps.train.distributed import DistributedSetup
from pipeline_steps.train.recipes.ip_adapter.data import IPAdapterDataModule
from tests.train.small_run import SMALL, adapter_phase, model_bytes, small_config

MakeProject = Callable[[Path], ProjectPaths]
CompletedRun = tuple[ProjectPaths, stage.StageReport]


@pytest.fixture(scope="module")
def completed_run(make_project: MakeProject, tmp_path_factory: pytest.TempPathFactory) -> CompletedRun:
    """Small project after an uninterrupted training run."""
    layout = make_project(tmp_path_factory.mktemp("completed_run"))
    return layout, stage.run(small_config(), layout)


def test_the_stage_writes_a_model_and_its_training_history(completed_run: CompletedRun) -> None:
    layout, report = completed_run
    report.check_balance()
    assert report.n_in == 8
    assert (report.cache_misses, report.cache_hits) == (8, 0)  # 4 clips, 2 augmentations
    assert report.metrics["pairs_train"] == 6
    files = set(model_bytes(layout))
    assert {"model_index.json", "training/loss.csv", "training/validation.csv", "training/step-000012.png"} <= files
    lines = (layout.model / "training/loss.csv").read_text().splitlines()
    assert lines[0] == "step,loss,loss_t0,loss_t1,loss_t2,loss_t3"
    assert len(lines) == 13
    assert len((layout.model / "training/validation.csv").read_text().splitlines()) == 5
    tone = np.sin(np.arange(48_000) / 20).astype(np.float32) * 0.3
    assert AutoAudio2ImagePipeline.from_pretrained(layout.model)(tone, num_samples=2).shape == (2, 32, 32, 3)
    assert not list(layout.runs.rglob("*.ckpt")), "a finished run keeps no checkpoint"


def test_scenes_are_trained_on_beside_the_pairs(make_project: MakeProject, tmp_path: Path) -> None:
    layout = make_project(tmp_path)
    ids = {row["tracks"][0]["audio_id"] for rows in stage.read_pairs(layout).values() for row in rows}
    numbers = dict.fromkeys(
        ("bytes", "sample_rate", "channels", "duration_s", "peak_dbfs", "silence_ratio", "clipping_ratio"), 1
    )
    texts = dict.fromkeys(("sha256", "path", "format", "group_id"), "")
    rows = [
        {"audio_id": name, "lufs": -20.0, "sources": [], "normalizations": [], "holdout": False, **numbers, **texts}
        for name in ids
    ]
    write_table(layout.catalog / "audio.parquet", AUDIO, rows)
    report = stage.run(small_config(scenes={"fraction": 0.5, "room_prob": 0.5}), layout)
    assert report.cache_misses == 8 + 2 * 3, "3 scenes, 2 augmentations"
    assert report.metrics["pairs_train"] == 6
    again = stage.run(small_config(scenes={"fraction": 0.5, "room_prob": 0.5}), layout)
    assert (again.cache_misses, again.cache_hits) == (0, 14)


def test_a_killed_and_resumed_run_gives_the_same_bytes(
    completed_run: CompletedRun, make_project: MakeProject, project: Path, tmp_path: Path
) -> None:
    layout = make_project(tmp_path)
    program = (
        "import json, sys; from pathlib import Path; from pipeline_steps.core.project_paths import ProjectPaths;"
        "from pipeline_steps.train.stage import TrainConfig, run;"
        "run(TrainConfig.from_params(json.loads(sys.argv[1])), ProjectPaths(Path(sys.argv[2])))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(SMALL), str(tmp_path)],
        cwd=project,
        env={**os.environ, "SONIFY_TRACKING": "off"},
    )
    deadline = time.monotonic() + 120
    # Step 6 comes after the checkpoint of step 4 and before that of step 8: the process is killed within an interval.
    while not list(layout.runs.rglob("samples/step-000006.png")):
        assert process.poll() is None, "the process exited before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not layout.model.exists()
    assert len(list(layout.runs.rglob("last.ckpt"))) == 1

    report = stage.run(small_config(), layout)
    assert (report.cache_misses, report.cache_hits) == (0, 8)
    expected, got = model_bytes(completed_run[0]), model_bytes(layout)
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []


@pytest.mark.parametrize("before", ["_train", "_export"])
def test_a_run_that_failed_before_training_or_export_is_completed(
    before: str, make_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_project(tmp_path)
    config = small_config(ip_adapter=adapter_phase(3))
    with monkeypatch.context() as patch:
        patch.setattr(stage, before, lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
        with pytest.raises(OSError, match="no space"):
            stage.run(config, layout)
    stage.run(config, layout)
    resumed = model_bytes(layout)
    other = make_project(tmp_path / "other")
    stage.run(config, other)
    assert resumed == model_bytes(other)


def test_a_checkpoint_of_another_configuration_is_rejected(make_project: MakeProject, tmp_path: Path) -> None:
    layout = make_project(tmp_path)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "digest": "another", "history": [], "validation": {}, "global_step": 3}, foreign)
    with pytest.raises(IntegrityError, match="belongs to run another"):
        stage.run(small_config(resume_from_checkpoint=str(foreign)), layout)
    with pytest.raises(ConfigError, match="does not exist"):
        stage.run(small_config(resume_from_checkpoint=str(tmp_path / "nowhere.ckpt")), layout)
    assert not layout.model.exists()


def fails_at(number: int, error: BaseException) -> Callable[..., TrainingBatch]:
    """`IPAdapterDataModule.training_batch` that raises at a step."""
    original = IPAdapterDataModule.training_batch

    def batch(datamodule: IPAdapterDataModule, step: int, micro: int = 0) -> TrainingBatch:
        if step == number:
            raise error
        return original(datamodule, step, micro)

    return batch


def test_a_retry_resumes_from_its_own_checkpoint_if_that_is_newer(
    completed_run: CompletedRun,
    make_project: MakeProject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, given = make_project(tmp_path), tmp_path / "given.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(IPAdapterDataModule, "training_batch", fails_at(6, OSError(5, "down")))
        with pytest.raises(OSError, match="down"):
            stage.run(small_config(), layout)
    shutil.copy(next(layout.runs.rglob("last.ckpt")), given)  # of step 4
    config = small_config(resume_from_checkpoint=str(given))
    with monkeypatch.context() as patch:
        patch.setattr(IPAdapterDataModule, "training_batch", fails_at(10, OSError(5, "down")))
        with pytest.raises(OSError, match="down"):
            stage.run(config, layout)
    with monkeypatch.context() as patch:
        patch.setattr(IPAdapterDataModule, "training_batch", fails_at(6, AssertionError("step 6 was done before")))
        stage.run(config, layout)
    assert model_bytes(layout) == model_bytes(completed_run[0])


@pytest.mark.parametrize("interrupted_at", [5, 9])
def test_a_checkpoint_at_a_validation_step_contains_the_validation(
    interrupted_at: int,
    completed_run: CompletedRun,
    make_project: MakeProject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, config = make_project(tmp_path), small_config(checkpointing_steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(IPAdapterDataModule, "training_batch", fails_at(interrupted_at, OSError(5, "down")))
        with pytest.raises(OSError, match="down"):
            stage.run(config, layout)
    stage.run(config, layout)
    assert model_bytes(layout) == model_bytes(completed_run[0])


def test_a_checkpoint_in_another_project_lacks_the_earlier_sample_grids(
    completed_run: CompletedRun,
    make_project: MakeProject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = make_project(tmp_path / "first"), make_project(tmp_path / "second")
    with monkeypatch.context() as patch:
        patch.setattr(IPAdapterDataModule, "training_batch", fails_at(6, OSError(5, "down")))
        with pytest.raises(OSError, match="down"):
            stage.run(small_config(), first)
    stage.run(small_config(resume_from_checkpoint=str(next(first.runs.rglob("last.ckpt")))), second)
    expected, found = model_bytes(completed_run[0]), model_bytes(second)
    del expected["training/step-000003.png"], expected[NAME], found[NAME]
    assert found == expected


def test_ctrl_c_interrupts_the_stage_with_exit_code_130(
    make_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (make_project(tmp_path).params).write_text(json.dumps({"train": SMALL}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(IPAdapterDataModule, "training_batch", fails_at(2, KeyboardInterrupt()))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert main(["train"]) == 130
    finally:  # Lightning ignores a second Ctrl-C while it ends
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert json.loads(Path("error.json").read_text())["kind"] == "interrupted"
    assert "run again to continue" in capsys.readouterr().err


def test_the_resolved_device_and_precision_are_part_of_the_digest(make_project: MakeProject, tmp_path: Path) -> None:
    layout, config = make_project(tmp_path), small_config(device="auto")
    encoder = build_tokenizer(config.audio, layout.assets, layout.root, "cpu")
    found = [("cpu", "32-true", 1), ("cpu", "bf16-mixed", 1), ("gpu", "bf16-mixed", 1), ("gpu", "bf16-mixed", 2)]
    runs = set()
    for place in found:
        setup = DistributedSetup(*place)
        runs.add(stage.run_digest(config, layout, encoder, stage.build_recipe(config, layout, setup), setup))
    assert len(runs) == len(found)


def test_the_digest_covers_the_code_that_the_recipe_imports(make_project: MakeProject, tmp_path: Path) -> None:
    layout, config, setup = make_project(tmp_path), small_config(), DistributedSetup("cpu", "32-true")
    names = {path.as_posix() for path in stage.source_files(stage.build_recipe(config, layout, setup))}
    imported = {name.split("pipeline_steps/")[-1] for name in names}
    assert {"train/recipes/ip_adapter/training.py", "diffusion/ip_adapter.py", "train/stage.py", "core/hashing.py"} <= imported
    assert not {name for name in imported if name.startswith(("tracking/", "evaluate/", "caption/"))}
    assert "models/vision/clip.py" not in imported


def test_non_finite_losses_stop_the_run_with_a_diagnosis(
    make_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_project(tmp_path)
    original = IPAdapterDataModule.training_batch

    def with_nan(datamodule: IPAdapterDataModule, number: int, micro: int = 0) -> TrainingBatch:
        batch = original(datamodule, number, micro)
        return dataclasses.replace(batch, noise=batch.noise * float("nan")) if number >= 5 else batch

    monkeypatch.setattr(IPAdapterDataModule, "training_batch", with_nan)
    with pytest.raises(DataError, match="3 steps in a row") as caught:
        stage.run(small_config(), layout)
    assert caught.value.exit_code == 3
    diagnosis = json.loads(next(layout.runs.rglob("not-finite.json")).read_text())
    assert diagnosis["step"] == 7
    assert len(diagnosis["rows"]) == 3
    assert diagnosis["last_good_checkpoint"] == "last.ckpt"
    assert diagnosis["parameters_not_finite"] == []
    assert not layout.model.exists()


def test_one_non_finite_loss_is_skipped(make_project: MakeProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_project(tmp_path)
    original = IPAdapterDataModule.training_batch

    def with_nan(datamodule: IPAdapterDataModule, number: int, micro: int = 0) -> TrainingBatch:
        batch = original(datamodule, number, micro)
        return dataclasses.replace(batch, noise=batch.noise * float("nan")) if number == 1 else batch

    monkeypatch.setattr(IPAdapterDataModule, "training_batch", with_nan)
    stage.run(small_config(ip_adapter=adapter_phase(3)), layout)
    lines = (layout.model / "training/loss.csv").read_text().splitlines()
    assert lines[2].startswith("2,,")
    assert len(lines) == 4
    assert float(lines[3].split(",")[1]) > 0


def test_a_missing_gpu_and_missing_training_pairs_are_errors(make_project: MakeProject, tmp_path: Path) -> None:
    from pipeline_steps.core.schemas import PAIRS
    from pipeline_steps.core.tables import read_table, write_table

    layout = make_project(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match="sees no GPU"):
            stage.run(small_config(device="cuda"), layout)
    rows = read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist()
    write_table(layout.pairs / "pairs.parquet", PAIRS, [{**row, "split": "test"} for row in rows])
    with pytest.raises(DataError, match="split 'train' has no pair"):
        stage.run(small_config(), layout)
