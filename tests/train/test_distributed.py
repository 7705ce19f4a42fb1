"""Several processes and microbatches: equal results, resumption, rejected settings."""

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
from ruamel.yaml import YAML
from safetensors.torch import load_file

from pipeline_steps.core.errors import ConfigError, ResourceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.train import stage
from pipeline_steps.train.config_groups import PerformanceConfig
from pipeline_steps.train.data import BatchPartition
from pipeline_steps.train.distributed import check_batch_size, resolve_setup
from tests.train.small_run import adapter_phase, small_config, small_section

MakeProject = Callable[[Path], ProjectPaths]
WAIT_S = 380


def adapter_group(dropout: float) -> dict[str, Any]:
    """Group `train.ip_adapter`: ten steps, with dropout."""
    return {"resampler": {"dropout": dropout}, **adapter_phase(10)}


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


def _write_params(layout: ProjectPaths, **performance: Any) -> None:
    section = small_section(ip_adapter=adapter_group(0.3), performance=performance)
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
    stage.run(small_config(ip_adapter=adapter_group(0.3), performance={"accumulate_grad_batches": 2}), layout)
    return layout


def _copy_project(of: ProjectPaths, make_project: MakeProject, root: Path) -> ProjectPaths:
    """Another project with the same inputs and the same result cache."""
    layout = make_project(root)
    shutil.copytree(of.root / ".cache", layout.root / ".cache")
    return layout


def test_microbatches_change_only_rounding(
    in_two_microbatches: ProjectPaths, make_project: MakeProject, tmp_path: Path
) -> None:
    layout = _copy_project(in_two_microbatches, make_project, tmp_path)
    halves = _copy_project(in_two_microbatches, make_project, tmp_path / "halves")
    group = adapter_group(dropout=0.0)
    stage.run(small_config(ip_adapter=group), layout)
    stage.run(small_config(ip_adapter=group, performance={"accumulate_grad_batches": 2}), halves)
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
        process.kill()  # its child exits with it
        process.communicate(timeout=60)
    assert len(list(layout.runs.rglob("last.ckpt"))) == 1


@pytest.mark.full
def test_two_killed_and_resumed_processes_give_the_same_model(
    in_two_microbatches: ProjectPaths, make_project: MakeProject, project: Path, tmp_path: Path
) -> None:
    layout = _copy_project(in_two_microbatches, make_project, tmp_path)
    _write_params(layout, devices=2, strategy="ddp")
    _kill_after_a_checkpoint(layout, _start(layout, project))
    output = _finish(_start(layout, project))
    assert output.count("resuming from step 4") == 1
    assert output.count("train: 8 in = 8 ok") == 1, "only process 0 writes the report"
    _assert_same(in_two_microbatches, layout)
    assert json.loads(layout.runtime("train").read_text())["cache_hits"] == 8
    assert len((layout.model / "training/loss.csv").read_text().splitlines()) == 11


@pytest.mark.full
def test_two_killed_and_resumed_machines_give_the_same_model(
    in_two_microbatches: ProjectPaths, make_project: MakeProject, project: Path, tmp_path: Path
) -> None:
    layout = _copy_project(in_two_microbatches, make_project, tmp_path)
    _write_params(layout, num_nodes=2)

    def start() -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return [_start(layout, project, NODE_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]

    _kill_after_a_checkpoint(layout, *start())
    outputs = [_finish(process) for process in start()]
    assert ["resuming from step 4" in output for output in outputs] == [True, False]
    assert ["train: 8 in = 8 ok" in output for output in outputs] == [True, False]
    _assert_same(in_two_microbatches, layout)


def test_impossible_distributions_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    check_batch_size(3, BatchPartition(accumulate=3), "train.ip_adapter")
    with pytest.raises(ConfigError, match=r"train\.ip_adapter: batch_size 3 is smaller than the number of microbatches, 4"):
        check_batch_size(3, BatchPartition(accumulate=4), "train.ip_adapter")
    two = PerformanceConfig(devices=2)
    if torch.cuda.device_count() == 1:
        with pytest.raises(ResourceError, match="devices is 2, but torch sees"):
            resolve_setup("cuda", "auto", two)
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError, match=r"torch .* sees no GPU"):
            resolve_setup("cuda", "auto", two)
    assert resolve_setup("cpu", "auto", two).rank == 0
    assert resolve_setup("cpu", "auto", two).precision == "32-true"
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert resolve_setup("cpu", "32-true", two).rank == 1
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ConfigError, match="4 were started"):
        resolve_setup("cpu", "32-true", two)
