"""Several processes and microbatches: what they share, that the result stays the same, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from safetensors.torch import load_file

from pipeline_steps.core.errors import ConfigError, ResourceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.train import stage
from pipeline_steps.train.data import BatchPartition, ScratchBatches
from pipeline_steps.train.distributed import resolve_distributed_setup
from tests.train.conftest import SMALL, phases, small_config
from tests.train.test_data import _stream

MakeProject = Callable[[Path], ProjectPaths]
WAIT_S = 380
STEPS = {**phases(4, 6), "warmup_steps": 2, "ema_decay": 0.8}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(20, 70))
def test_processes_and_microbatches_take_each_sample_once(ranks: int, accumulate: int, count: int) -> None:
    taken: list[int] = []
    for rank in range(ranks):
        for micro in range(accumulate):
            taken += range(count)[BatchPartition(rank, ranks, accumulate).slice_of(count, micro)]
    assert taken == list(range(count))


def test_slices_are_cuts_of_the_whole_batch() -> None:
    whole = _stream(0)
    part = whole.config.picture.model_copy(update={"mirror": 0.5, "shift": 0.1})
    config = whole.config.model_copy(update={"picture": part})
    whole = ScratchBatches(whole.data, whole.codec, config, 0)
    for number in (0, 4):
        expected = whole.batch(number)
        cuts = [
            ScratchBatches(whole.data, whole.codec, config, 0, BatchPartition(rank, 2, 1)).batch(number) for rank in range(2)
        ]
        assert [row for cut in cuts for row in cut.rows] == expected.rows
        for name in ("latents", "noise", "times", "heard"):
            assert torch.equal(torch.cat([getattr(cut, name) for cut in cuts]), getattr(expected, name)), name
        assert torch.equal(torch.cat([cut.tokens.frames for cut in cuts]), expected.tokens.frames)
        assert sum(cut.weight for cut in cuts) / 2 == pytest.approx(1.0)
        assert [(cut.part, cut.parts, cut.total, cut.last) for cut in cuts] == [
            (0, 2, len(expected.rows), True),
            (1, 2, len(expected.rows), True),
        ]


def _weights(layout: ProjectPaths) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{name}": value
        for path in sorted(layout.model.rglob("*.safetensors"))
        if path.parent.name != "encoder"
        for name, value in load_file(path).items()
    }


def _assert_same(one: ProjectPaths, other: ProjectPaths) -> None:
    a, b = _weights(one), _weights(other)
    assert a.keys() == b.keys()
    differences = {name: float((a[name] - b[name]).abs().max()) for name in a}
    assert not {name: value for name, value in differences.items() if not value < 2e-5}


def _write_params(layout: ProjectPaths, **speed: Any) -> None:
    section = {**SMALL, "conditioner": {**SMALL["conditioner"], "dropout": 0.3}, "optimiser": STEPS, "speed": speed}
    with layout.params.open("w") as file:
        YAML().dump({"train": section}, file)


def _start(layout: ProjectPaths, project: Path, **environment: str) -> subprocess.Popen[str]:
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("LOCAL_", "NODE_", "MASTER_", "WORLD_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline_steps", "train"],
        cwd=layout.root,
        env={**keep, "PYTHONPATH": str(project), "SONIFY_TRACKING": "off", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == code, output[-4000:]
    return output


@pytest.fixture(scope="module")
def in_two_microbatches(make_project: MakeProject, tmp_path_factory: pytest.TempPathFactory) -> ProjectPaths:
    """One process, two microbatches a step."""
    layout = make_project(tmp_path_factory.mktemp("microbatches"))
    config = small_config(optimiser=STEPS, conditioner={"dropout": 0.3}).model_dump(mode="json") | {"speed": {"accumulate": 2}}
    stage.run(stage.TrainConfig.model_validate(config), layout)
    return layout


def _twin(of: ProjectPaths, make_project: MakeProject, root: Path) -> ProjectPaths:
    """Another project with the same inputs and what was remembered and learned of them before training."""
    layout = make_project(root)
    shutil.copytree(of.root / ".cache", layout.root / ".cache")
    return layout


def test_microbatches_change_nothing_but_rounding(
    in_two_microbatches: ProjectPaths, make_project: MakeProject, tmp_path: Path
) -> None:
    layout = _twin(in_two_microbatches, make_project, tmp_path)
    quiet = small_config(optimiser=STEPS, conditioner={"dropout": 0.0}).model_dump(mode="json")
    halves = _twin(in_two_microbatches, make_project, tmp_path / "halves")
    stage.run(stage.TrainConfig.model_validate(quiet), layout)
    stage.run(stage.TrainConfig.model_validate(quiet | {"speed": {"accumulate": 2}}), halves)
    _assert_same(layout, halves)
    rows = [(root.model / "training/loss.csv").read_text().splitlines() for root in (layout, halves)]
    assert len(rows[0]) == len(rows[1]) == 11
    for one, other in zip(rows[0][1:], rows[1][1:], strict=True):
        assert float(one.split(",")[1]) == pytest.approx(float(other.split(",")[1]), rel=1e-3)


def _kill_after_a_checkpoint(layout: ProjectPaths, *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not list(layout.runs.rglob("samples/step-000006.png")):  # after the checkpoint of step 4
        for process in processes:
            assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for process in processes:
        process.kill()  # its child follows it
        process.communicate(timeout=60)
    assert len(list(layout.runs.rglob("last.ckpt"))) == 1


@pytest.mark.full
def test_two_processes_that_share_a_model_killed_and_started_again_end_as_one(
    in_two_microbatches: ProjectPaths, make_project: MakeProject, project: Path, tmp_path: Path
) -> None:
    layout = _twin(in_two_microbatches, make_project, tmp_path)
    _write_params(layout, devices=2, strategy="fsdp")
    _kill_after_a_checkpoint(layout, _start(layout, project))
    output = _finish(_start(layout, project))
    assert output.count("going on from step 4") == 1
    assert output.count("train: 8 in = 8 ok") == 1, "process 0 alone reports"
    _assert_same(in_two_microbatches, layout)
    assert json.loads(layout.report("train").read_text())["reused"] == 8
    assert len((layout.model / "training/loss.csv").read_text().splitlines()) == 11


@pytest.mark.full
def test_two_machines_killed_and_started_again_end_as_one(
    in_two_microbatches: ProjectPaths, make_project: MakeProject, project: Path, tmp_path: Path
) -> None:
    layout = _twin(in_two_microbatches, make_project, tmp_path)
    _write_params(layout, num_nodes=2)

    def start() -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return [_start(layout, project, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]

    _kill_after_a_checkpoint(layout, *start())
    outputs = [_finish(process) for process in start()]
    assert ["going on from step 4" in output for output in outputs] == [True, False]
    assert ["train: 8 in = 8 ok" in output for output in outputs] == [True, False]
    _assert_same(in_two_microbatches, layout)


def _with_speed(**speed: Any) -> stage.TrainConfig:
    return stage.TrainConfig.model_validate(small_config().model_dump(mode="json") | {"speed": speed})


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"batch_size is 3, fewer than its 4 slices"):
        resolve_distributed_setup(_with_speed(accumulate=4), "cpu", "32-true")
    two = _with_speed(devices=2)
    if torch.cuda.device_count() < 2:
        with pytest.raises(ResourceError, match="devices is 2, but torch sees"):
            resolve_distributed_setup(two, "gpu", "bf16-mixed")
    assert resolve_distributed_setup(two, "cpu", "32-true").rank == 0
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert resolve_distributed_setup(two, "cpu", "32-true").rank == 1
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ConfigError, match="4 processes were started"):
        resolve_distributed_setup(two, "cpu", "32-true")
    with pytest.raises(ValueError, match="do not go together"):
        stage.TrainConfig.model_validate({"speed": {"compile": "on", "strategy": "fsdp"}})
