"""Learning rate schedule, averaged weights, losses by interval of time."""

from __future__ import annotations

import itertools
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from pipeline_steps.train.callbacks import EMACallback
from pipeline_steps.train.lightning_module import bucket_sums, warmup_cosine
from tests.train.small_run import EMARecorder, small_datamodule, small_module


def test_the_learning_rate_rises_then_falls_to_its_final_ratio() -> None:
    rates = [warmup_cosine(step, 100, 10, 0.05) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.05)
    assert warmup_cosine(10_000, 100, 10, 0.05) == pytest.approx(0.05)


def test_the_trained_weights_are_the_moving_average(backbone: Path) -> None:
    module = small_module(backbone)
    recorder = EMARecorder(0.7)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=10, max_epochs=-1, callbacks=[EMACallback(0.7), recorder], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=small_datamodule(backbone))
    for name, value in module.named_parameters():
        assert torch.allclose(value, recorder.average[name], atol=1e-5), name


def test_losses_are_summed_by_interval_of_time() -> None:
    sums, counts = bucket_sums(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0.1, 0.2, 1.0]), 4)
    assert sums.tolist() == [4.0, 0.0, 0.0, 10.0]
    assert counts.tolist() == [2.0, 0.0, 0.0, 1.0]
