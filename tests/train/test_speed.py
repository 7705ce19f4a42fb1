"""What makes training faster or smaller changes no result, and is decided by measurement."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from pipeline_steps.train import compile_probe
from pipeline_steps.train.callbacks import EVERY, EMACallback, MetricsCallback
from pipeline_steps.train.compile_probe import CompileProbe, force_eager, is_compile_worthwhile
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.data import BatchPartition, ScratchBatches, TrainingBatch
from pipeline_steps.train.distributed import DistributedSetup, apply_memory_settings
from pipeline_steps.train.fsdp import shard_model, unshard_model
from pipeline_steps.train.lightning_module import DiffusionModule, build_conditioner, build_denoiser
from pipeline_steps.train.prefetch import TimedLoader
from tests.train.conftest import phases, small_config
from tests.train.test_data import _stream
from tests.train.test_training_parts import _Recorder

TINY: dict[str, Any] = {
    "picture_size": 16,
    "codec": {"channels": 4},
    "objective": {"coarse_channels": 2},
    "conditioner": {"frames": 2, "frame_components": 4, "tag_components": 4},
}
CPU = torch.device("cpu")
ONE = DistributedSetup("cpu", "32-true", 1, 1, "single", 0, 1)


def tiny(**speed: Any) -> tuple[DiffusionModule, TrainConfig]:
    """A module of a few thousand weights, the same every time."""
    config = small_config(**TINY, optimiser={**phases(4, 8), "ema_decay": 0.7})
    config = TrainConfig.model_validate(config.model_dump(mode="json") | {"speed": speed})
    torch.manual_seed(0)
    return DiffusionModule(config, build_denoiser(config, build_conditioner(config)), "digest"), config


def fit(module: DiffusionModule, *callbacks: Callback, steps: int = 6, **arguments: Any) -> pl.Trainer:
    """A few steps on `_stream`, whose phase changes at step 4."""
    stream = _stream(0)
    if module.config.speed.accumulate > 1:
        stream.share = BatchPartition(accumulate=module.config.speed.accumulate)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, callbacks=list(callbacks), logger=False, barebones=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accumulate_grad_batches=module.config.speed.accumulate, **arguments,
    )  # fmt: skip
    trainer.fit(module, TimedLoader(stream, CPU))
    return trainer


def weights(module: DiffusionModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    """Weights after six steps with the defaults."""
    module, config = tiny()
    apply_memory_settings(module.unet, config, ONE)
    fit(module, EMACallback(0.7))
    return weights(module)


@pytest.mark.parametrize("speed", [{"gradient_checkpointing": True}, {"channels_last": "on"}])
def test_memory_layout_and_checkpointing_change_only_rounding(speed: dict[str, Any], plain: dict[str, torch.Tensor]) -> None:
    module, config = tiny(**speed)
    apply_memory_settings(module.unet, config, ONE)
    fit(module, EMACallback(0.7))
    assert largest_difference(plain, weights(module)) < 2e-5
    kernel = module.denoiser.unet.conv_in.weight
    assert kernel.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in speed)
    assert module.denoiser.unet.is_gradient_checkpointing == ("gradient_checkpointing" in speed)


def test_the_average_moves_once_an_optimiser_step_with_microbatches() -> None:
    class OncePerStep(_Recorder):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch.last:
                super().on_train_batch_end(trainer, pl_module)

    module, _ = tiny(accumulate=2)
    recorder = OncePerStep(0.7)
    fit(module, EMACallback(0.7), recorder, steps=6)
    assert EVERY < 6, "the average moved more than once"
    assert len(module.history) == 6
    for name, value in module.named_parameters():
        assert torch.allclose(value, recorder.average[name], atol=1e-5), name


def test_a_step_is_left_out_if_one_of_its_microbatches_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ScratchBatches.batch
    seen: list[torch.Tensor] = []

    def poisoned(stream: ScratchBatches, number: int, micro: int = 0) -> TrainingBatch:
        batch = honest(stream, number, micro)
        return dataclasses.replace(batch, noise=batch.noise * float("nan")) if (number, micro) == (5, 0) else batch

    class Keep(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch.last:
                seen.append(torch.cat([value.detach().flatten() for value in pl_module.parameters()]))

    monkeypatch.setattr(ScratchBatches, "batch", poisoned)
    module, _ = tiny(accumulate=2)
    fit(module, Keep(), steps=8)
    assert [math.isfinite(row["loss"]) for row in module.history] == [True] * 5 + [False] + [True] * 2
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(seen)]
    assert moved == [True] * 4 + [False] + [True] * 2
    assert bool(torch.isfinite(seen[-1]).all())


def test_attention_is_fused() -> None:
    module, _ = tiny()
    processors = module.denoiser.unet.attn_processors.values()
    assert processors
    assert {type(processor).__name__ for processor in processors} == {"AttnProcessor2_0"}


def test_half_precision_runs_on_the_cpu_too(plain: dict[str, torch.Tensor]) -> None:
    module, _ = tiny()
    fit(module, EMACallback(0.7), precision="bf16-mixed")
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert 0.0 < largest_difference(plain, weights(module)) < 0.05


@pytest.mark.parametrize(
    ("eager", "compiled", "compile_s", "steps", "expected"),
    [(0.5, 0.3, 60.0, 1000, True), (0.5, 0.3, 60.0, 299, False), (0.5, 0.51, 0.0, 10_000, False)],
)
def test_compiling_pays_when_all_of_it_is_shorter(
    eager: float, compiled: float, compile_s: float, steps: int, expected: bool
) -> None:
    assert is_compile_worthwhile(eager, compiled, compile_s, steps) is expected


class _Clock:
    """A clock that the work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("compiled_s", "kept"), [(0.1, True), (0.9, False)])
def test_the_probe_decides_by_its_clock_and_changes_no_result(
    compiled_s: float, kept: bool, monkeypatch: pytest.MonkeyPatch, plain: dict[str, torch.Tensor]
) -> None:
    module, config = tiny()
    apply_memory_settings(module.unet, config, ONE)
    clock = _Clock()
    honest = DiffusionModule.losses

    def losses(self: DiffusionModule, batch: Any) -> torch.Tensor:
        clock.now += compiled_s if self.denoiser.unet._compiled_call_impl is not None else 0.5
        return honest(self, batch)

    monkeypatch.setattr(compile_probe, "time", clock)
    monkeypatch.setattr(DiffusionModule, "losses", losses)
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    compilation = CompileProbe("auto", lambda: _stream(0).batch(5), 1000, backend=backend)
    monkeypatch.setattr(compilation, "_decide", lambda trainer, probed: compilation.probe(trainer, probed))
    fit(module, compilation, EMACallback(0.7))
    assert module.compiled is kept
    assert (module.denoiser.unet._compiled_call_impl is not None) is kept
    assert module.speed == {
        "compile": kept, "steps": 1000, "eager_ms": 500.0, "compiled_ms": round(compiled_s * 1000, 2),
        "compile_s": pytest.approx(max(0.0, 3 * (compiled_s - 0.5))),
    }  # fmt: skip
    assert graphs, "the U-Net was traced"
    assert len(module.history) == 6, "probing is no step"
    assert largest_difference(plain, weights(module)) == 0.0


def test_a_compiler_that_fails_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch, plain: dict[str, torch.Tensor]) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    module, _ = tiny()
    monkeypatch.setattr(compile_probe, "SHORTEST_S", 0.0)
    compilation = CompileProbe("auto", lambda: _stream(0).batch(5), 1000, backend=backend)
    monkeypatch.setattr(compilation, "_decide", lambda trainer, probed: compilation.probe(trainer, probed))
    fit(module, compilation, EMACallback(0.7))
    assert module.compiled is False
    assert "compiled_ms" not in module.speed
    assert largest_difference(plain, weights(module)) == 0.0


def test_on_a_cpu_nothing_is_probed_and_a_resumed_run_keeps_its_decision() -> None:
    module, _ = tiny()
    fit(module, CompileProbe("auto", lambda: _stream(0).batch(5), 1_000_000, backend="eager"), steps=1)
    assert module.compiled is False
    assert module.speed == {}
    checkpoint: dict[str, Any] = {}
    module.compiled = True
    module.on_save_checkpoint(checkpoint)
    again, _ = tiny()
    again.on_load_checkpoint(checkpoint)
    fit(again, CompileProbe("off", lambda: _stream(0).batch(5), 10, backend="eager"), steps=1)
    assert again.denoiser.unet._compiled_call_impl is not None
    assert again.compiled


def test_drawing_does_not_compile() -> None:
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return graph.forward

    class Twice(nn.Module):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return value * 2 + 1

    part = Twice()
    part.compile(backend=backend)
    with force_eager(True):
        part(torch.zeros(1, 2))
    assert not calls
    part(torch.zeros(1, 2))
    assert len(calls) == 1


class _Notes:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, values: Any, step: int = 0) -> None:
        self.rows.append((step, dict(values)))

    def log_image(self, key: str, image: Any, step: int = 0) -> None:
        raise AssertionError(key)


def test_waiting_is_reported_once_an_optimiser_step() -> None:
    module, _ = tiny(accumulate=2)
    notes = _Notes()
    fit(module, MetricsCallback(2, notes, lambda: 0.0), steps=6)
    assert [step for step, _ in notes.rows] == [2, 4, 6]
    for _, values in notes.rows:
        assert set(values) == {"train/loss", "train/learning_rate", "train/samples_per_second", "train/wait_share"}
        assert values["train/wait_share"] == 0.0


def test_a_cut_model_learns_averages_and_resumes_as_a_whole_one(plain: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """One process holds all pieces here; `test_hardware` has two."""
    strategy = DistributedSetup("cpu", "32-true", 1, 1, "fsdp", 0, 1).trainer_arguments()["strategy"]
    module, _ = tiny(strategy="fsdp")
    whole = module.denoiser
    module.mesh_blocks = shard_model
    averages = EMACallback(0.7)
    trainer = fit(module, averages, strategy=strategy)
    with averages.ema_scope(module):
        assert module.denoiser is not whole
        assert math.isfinite(module.validation_loss(_stream(0).batch(5)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys() == plain.keys()
    assert largest_difference(plain, saved["state_dict"]) < 2e-5, "the average is what is exported"
    unshard_model(module)
    assert module.denoiser is whole
    assert largest_difference(plain, weights(module)) < 2e-5
