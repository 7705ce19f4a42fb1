"""`accumulate_grad_batches: auto`: the number of microbatches is found by trying, recorded, and changes only rounding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline_steps.core.errors import ResourceError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.train import stage
from pipeline_steps.train.data import BatchPartition, TrainingBatch
from pipeline_steps.train.distributed import DistributedSetup
from pipeline_steps.train.microbatches import find_microbatches
from pipeline_steps.train.recipes.ip_adapter.data import IPAdapterDataModule
from pipeline_steps.train.recipes.ip_adapter.lightning_module import AudioIPAdapterModule
from tests.train.small_run import adapter_phase, model_bytes, small_config, small_datamodule, small_module

MakeProject = Callable[[Path], ProjectPaths]
SETUP = DistributedSetup("cpu", "32-true")


@pytest.fixture
def limit_samples(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[TrainingBatch]]:
    """Memory for so many samples: a forward pass of more raises torch's error. Returns the batches of all passes."""
    original = AudioIPAdapterModule.per_sample_loss

    def limit(samples: int) -> list[TrainingBatch]:
        seen: list[TrainingBatch] = []

        def guarded(module: AudioIPAdapterModule, batch: TrainingBatch) -> torch.Tensor:
            seen.append(batch)
            if len(batch) > samples:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return original(module, batch)

        monkeypatch.setattr(AudioIPAdapterModule, "per_sample_loss", guarded)
        return seen

    return limit


@pytest.mark.parametrize(("samples", "expected", "tried"), [(3, 1, [3]), (2, 2, [3, 2]), (1, 3, [3, 2, 1])])
def test_the_fewest_microbatches_that_fit(
    samples: int, expected: int, tried: list[int], limit_samples: Callable[[int], list[TrainingBatch]], backbone: Path
) -> None:
    seen = limit_samples(samples)
    module, datamodule = small_module(backbone), small_datamodule(backbone)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert find_microbatches(module, datamodule, SETUP, 3) == expected
    assert [len(batch) for batch in seen] == [*tried, tried[-1]], "the one that fits runs twice, with gradients in memory"
    assert all(batch.audio.mask.shape[1] == 5 and bool(batch.audio.mask.all()) for batch in seen), "the longest clip"
    assert datamodule.partition == BatchPartition()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(weight.grad is None for weight in module.parameters())


def test_one_sample_that_does_not_fit_names_the_keys(
    limit_samples: Callable[[int], list[TrainingBatch]], backbone: Path
) -> None:
    seen = limit_samples(0)
    with pytest.raises(ResourceError, match=r"train\.performance\.accumulate_grad_batches.*train\.resolution: not even one"):
        find_microbatches(small_module(backbone), small_datamodule(backbone), SETUP, 3)
    assert [len(batch) for batch in seen] == [3, 2, 1]


def test_another_error_is_raised(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(AudioIPAdapterModule, "per_sample_loss", fail)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        find_microbatches(small_module(backbone), small_datamodule(backbone), SETUP, 3)


def test_an_interrupted_run_resumes_with_the_number_that_was_found(
    limit_samples: Callable[[int], list[TrainingBatch]],
    make_project: MakeProject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def config(accumulate: int | str, dropout: float = 0.0) -> Any:
        group = {"resampler": {"dropout": dropout}, **adapter_phase(6)}
        return small_config(ip_adapter=group, checkpointing_steps=2, performance={"accumulate_grad_batches": accumulate})

    whole = make_project(tmp_path / "whole")
    stage.run(config(1), whole)
    limit_samples(2)
    layout = make_project(tmp_path / "auto")
    stage.run(config("auto", 0.1), layout)
    expected = model_bytes(layout)
    record = next(layout.runs.rglob("microbatches.json"))
    assert json.loads(record.read_text()) == {"accumulate_grad_batches": 2}

    record.unlink()
    original = IPAdapterDataModule.training_batch

    def failing(datamodule: IPAdapterDataModule, step: int, micro: int = 0) -> TrainingBatch:
        if step == 5:
            raise OSError(5, "the machine goes down")
        return original(datamodule, step, micro)

    with monkeypatch.context() as patch:
        patch.setattr(IPAdapterDataModule, "training_batch", failing)
        with pytest.raises(OSError, match="goes down"):
            stage.run(config("auto", 0.1), layout)
    checkpoint = torch.load(next(layout.runs.rglob("last.ckpt")), weights_only=True)
    assert (checkpoint["global_step"], checkpoint["accumulate_grad_batches"]) == (4, 2)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "find_microbatches", None)  # not tried again
        stage.run(config("auto", 0.1), layout)
    assert model_bytes(layout) == expected

    stage.run(config("auto"), layout)
    one, other = (load_file(root.model / "ip_adapter.safetensors") for root in (whole, layout))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 2e-5


def test_too_little_memory_in_training_names_the_keys(
    limit_samples: Callable[[int], list[TrainingBatch]], make_project: MakeProject, tmp_path: Path
) -> None:
    limit_samples(2)
    with pytest.raises(ResourceError, match=r"accumulate_grad_batches.*CUDA out of memory") as caught:
        stage.run(small_config(), make_project(tmp_path))
    assert "accumulate_grad_batches to auto" in caught.value.action
