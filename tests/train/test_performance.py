"""Settings that make training faster or smaller do not change its result; metrics and fallbacks of the loop."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from pipeline_steps.tracking import NoOpTracker
from pipeline_steps.train.callbacks import EMA_EVERY_N_STEPS, EMACallback, SampleGridCallback, ThroughputCallback
from pipeline_steps.train.compilation import inductor_or_eager
from pipeline_steps.train.config_groups import PerformanceConfig
from pipeline_steps.train.data import BatchPartition, TrainingBatch
from pipeline_steps.train.distributed import DistributedSetup, apply_memory_settings
from pipeline_steps.train.recipes.ip_adapter.data import IPAdapterDataModule
from pipeline_steps.train.recipes.ip_adapter.lightning_module import AudioIPAdapterModule
from pipeline_steps.train.tracking_logger import TrackingLogger
from tests.train.small_run import EMARecorder, small_datamodule, small_module

Weights = dict[str, torch.Tensor]


def setup_for(**performance: Any) -> DistributedSetup:
    return DistributedSetup("cpu", "32-true", performance=PerformanceConfig.model_validate(performance))


def fit(
    module: AudioIPAdapterModule, *callbacks: Callback, steps: int = 6, accumulate: int = 1, **arguments: Any
) -> pl.Trainer:
    """A few steps."""
    given = {"logger": False, "limit_val_batches": 0, **arguments}
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, callbacks=list(callbacks), barebones=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate, **given,
    )  # fmt: skip
    trainer.fit(
        module, datamodule=small_datamodule(Path(module.denoiser.backbone.model), BatchPartition(accumulate=accumulate))
    )
    return trainer


def weights(module: AudioIPAdapterModule) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def largest_difference(one: Weights, other: Weights) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def plain(backbone: Path) -> Weights:
    """Weights after six steps with the defaults."""
    module = small_module(backbone)
    apply_memory_settings(module.unet, setup_for())
    fit(module, EMACallback(0.7))
    return weights(module)


@pytest.mark.parametrize("performance", [{"gradient_checkpointing": True}, {"channels_last": True}])
def test_memory_settings_change_only_rounding(performance: dict[str, Any], plain: Weights, backbone: Path) -> None:
    module = small_module(backbone)
    apply_memory_settings(module.unet, setup_for(**performance))
    fit(module, EMACallback(0.7))
    assert largest_difference(plain, weights(module)) < 2e-5
    kernel = module.unet.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in performance)
    assert module.unet.is_gradient_checkpointing == ("gradient_checkpointing" in performance)


def test_the_average_is_updated_once_per_optimizer_step(backbone: Path) -> None:
    module = small_module(backbone)
    recorder = EMARecorder(0.7)
    fit(module, EMACallback(0.7), recorder, steps=6, accumulate=2)
    assert EMA_EVERY_N_STEPS < 6, "the average is updated more than once"
    assert len(module.history) == 6
    for name, value in module.named_parameters():
        assert torch.allclose(value, recorder.average[name], atol=1e-5), name


def test_a_step_is_skipped_if_one_of_its_microbatches_is_not_finite(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    original = IPAdapterDataModule.training_batch
    parameters: list[torch.Tensor] = []

    def with_nan(datamodule: IPAdapterDataModule, step: int, micro: int = 0) -> TrainingBatch:
        batch = original(datamodule, step, micro)
        return dataclasses.replace(batch, noise=batch.noise * float("nan")) if (step, micro) == (5, 0) else batch

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch.last:
                parameters.append(torch.cat([value.detach().flatten() for value in pl_module.parameters()]))

    monkeypatch.setattr(IPAdapterDataModule, "training_batch", with_nan)
    module = small_module(backbone)
    fit(module, Keep(), steps=8, accumulate=2)
    assert [math.isfinite(row["loss"]) for row in module.history] == [True] * 5 + [False] + [True] * 2
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(parameters)]
    assert moved == [True] * 4 + [False] + [True] * 2
    assert bool(torch.isfinite(parameters[-1]).all())


def test_attention_is_fused(backbone: Path) -> None:
    processors = small_module(backbone).unet.attn_processors.values()
    assert {type(processor).__name__ for processor in processors} == {"AttnProcessor2_0", "IPAdapterAttnProcessor2_0"}


def test_half_precision_runs_on_the_cpu_too(plain: Weights, backbone: Path) -> None:
    module = small_module(backbone)
    fit(module, EMACallback(0.7), precision="bf16-mixed")
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert 0.0 < largest_difference(plain, weights(module)) < 0.05


def test_optimizations_are_on_by_default_on_gpus_only() -> None:
    gpu = DistributedSetup("gpu", "bf16-mixed")
    assert (gpu.compile, gpu.channels_last) == (True, True)
    assert gpu.loader_arguments == {"num_workers": 2, "prefetch_factor": 2, "pin_memory": True}
    assert (setup_for().compile, setup_for().channels_last) == (False, False)
    assert setup_for().loader_arguments == {"num_workers": 0, "prefetch_factor": None, "pin_memory": False}
    assert setup_for(compile=True, num_workers=1, prefetch_factor=3).compile
    assert setup_for(num_workers=1, prefetch_factor=3).loader_arguments["prefetch_factor"] == 3


def test_a_compiler_that_fails_does_not_stop_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, plain: Weights, backbone: Path
) -> None:
    def failing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", failing)
    module = small_module(backbone)
    module.unet.compile(backend=inductor_or_eager)
    with caplog.at_level(logging.WARNING, "pipeline_steps"):
        fit(module, EMACallback(0.7))
    assert "torch.compile failed, training continues without it: RuntimeError: no C++ compiler" in caplog.text
    assert largest_difference(plain, weights(module)) == 0.0


def test_a_compiled_network_is_compiled_in_training_and_eager_in_validation(plain: Weights, backbone: Path) -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    class Network(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value * 2 + 1

    network = Network()
    network.compile(backend=backend)
    module = small_module(backbone)
    module.compiled = True
    module.on_validation_start()
    network(torch.zeros(1, 2))
    assert not graphs
    module.on_validation_end()
    network(torch.zeros(1, 2))
    assert len(graphs) == 1
    module.unet.compile(backend=backend)
    fit(module, EMACallback(0.7))
    assert len(graphs) > 1, "the U-Net was traced"
    assert largest_difference(plain, weights(module)) == 0.0


class RecordingTracker(NoOpTracker):
    """Tracker that records metrics and images in memory."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[str, int]] = []

    def log_metrics(self, values: Any, step: int = 0) -> None:
        self.rows.append((step, dict(values)))

    def log_image(self, key: str, image: Any, step: int = 0) -> None:
        self.images.append((key, step))


def test_metrics_are_tracked_by_optimizer_step(backbone: Path) -> None:
    module, notes, grids = small_module(backbone), RecordingTracker(), []
    fit(
        module, EMACallback(0.7), SampleGridCallback(lambda: torch.zeros(2, 2, 3).numpy(), lambda step, _: grids.append(step)),
        ThroughputCallback(2), steps=7, accumulate=2, logger=TrackingLogger(notes, "toy"), log_every_n_steps=2,
        limit_val_batches=1.0, val_check_interval=6, check_val_every_n_epoch=None,
    )  # fmt: skip
    training = [(step, values) for step, values in notes.rows if "train/loss_toy" in values]
    assert [step for step, _ in training] == [2, 4, 6, 7]
    for step, values in training:
        assert set(values) == {"train/loss_toy", "train/learning_rate", "train/samples_per_second", "train/data_wait_ratio"}
        assert 0.0 <= values["train/data_wait_ratio"] <= 1.0
        assert values["train/loss_toy"] == pytest.approx(sum(row["loss"] for row in module.history[:step]) / step)
    losses = {step: values["train/validation_loss_toy"] for step, values in notes.rows if "train/validation_loss_toy" in values}
    assert losses == {int(step): pytest.approx(loss) for step, loss in module.validation.items()}
    assert list(losses) == grids == [3, 6, 7], "the last step is validated too"
    assert notes.images == [("samples/grid_by_validation", step - 1) for step in grids]


def test_the_time_spent_waiting_for_data_is_measured(monkeypatch: pytest.MonkeyPatch, backbone: Path) -> None:
    import time

    original = IPAdapterDataModule.training_batch

    def slow(datamodule: IPAdapterDataModule, step: int, micro: int = 0) -> TrainingBatch:
        time.sleep(0.2)
        return original(datamodule, step, micro)

    monkeypatch.setattr(IPAdapterDataModule, "training_batch", slow)
    notes = RecordingTracker()
    fit(small_module(backbone), ThroughputCallback(2), steps=4, logger=TrackingLogger(notes, "toy"), log_every_n_steps=2)
    assert all(values["train/data_wait_ratio"] > 0.3 for _, values in notes.rows if "train/loss_toy" in values)
