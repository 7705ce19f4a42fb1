"""Lightning callbacks: averaged weights, sample grid, throughput, progress, resumable checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.train.data import TrainingBatch
from pipeline_steps.train.lightning_module import LOG_EVERY_N_STEPS, DiffusionModule

EMA_EVERY_N_STEPS = 4
"""Steps between updates of the averaged weights. An update reads all weights, and a smaller interval changes little."""


class EMACallback(EMAWeightAveraging):  # type: ignore[misc, unused-ignore]
    """Exponential moving average of the weights, used for validation and after training.

    Args:
        decay: per optimizer step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay**EMA_EVERY_N_STEPS, use_buffers=False, update_every_n_steps=EMA_EVERY_N_STEPS)


class StepCheckpoint(ModelCheckpoint):  # type: ignore[misc, unused-ignore]
    """Checkpoint every n steps. At a step with validation it is saved after the validation.

    A checkpoint that is saved before the validation of its step would lose that validation on resume.

    Args:
        validation_steps: steps between validations.
        arguments: those of `ModelCheckpoint`.
    """

    def __init__(self, validation_steps: int, **arguments: Any) -> None:
        super().__init__(save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=False, **arguments)
        self.validation_steps = validation_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the checkpoint unless validation follows."""
        if trainer.global_step % self.validation_steps and trainer.global_step != trainer.max_steps:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the checkpoint of a step with validation."""
        super().on_train_batch_end(trainer, pl_module, None, None, 0)


class SampleGridCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Sample grid with averaged weights at each validation. Must follow `EMACallback` in the list of callbacks.

    The last step is validated too, whether or not it is a multiple of the interval.

    Args:
        sample: generate the grid uint8 [H, W, 3] with the present weights.
        save: called with the step and the grid.
    """

    def __init__(self, sample: Callable[[], ByteArray], save: Callable[[int, ByteArray], None]) -> None:
        self.sample = sample
        self.save = save

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Request validation after the last step: Lightning validates before it stops."""
        trainer.should_stop = trainer.should_stop or trainer.global_step == trainer.max_steps

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Generate the grid in the first process."""
        if not trainer.is_global_zero:
            return
        grid = self.sample()
        self.save(trainer.global_step, grid)
        for logger in trainer.loggers:
            logger.log_image("samples/grid", grid, trainer.global_step)


class ThroughputCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Learning rate, samples per second and the fraction of time spent waiting for data, logged every n steps.

    On a GPU the waiting time is measured on the device: a batch that is late while earlier work still runs costs nothing.
    """

    def __init__(self, every_n_steps: int = LOG_EVERY_N_STEPS) -> None:
        self.every_n_steps = every_n_steps
        self._step = 0
        self._begin = 0.0
        self._waited = 0.0
        self._batch_end: Any = None
        self._waits: list[tuple[Any, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._begin, self._step = time.monotonic(), trainer.global_step
        self._batch_end = _now(pl_module.device)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the wait since the last batch."""
        self._waits.append((self._batch_end, _now(pl_module.device)))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not count the validation as waiting."""
        self._batch_end = _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DiffusionModule, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        """Log the values of the steps since the last time."""
        self._batch_end = _now(pl_module.device)
        step = trainer.global_step
        if step == self._step or (step % self.every_n_steps and step != trainer.max_steps):
            return
        now, samples = time.monotonic(), batch.total or len(batch.rows)
        seconds = max(now - self._begin, 1e-9)
        waited = sum(_seconds(*wait) for wait in self._waits)
        values = {
            "train/learning_rate": max(float(group["lr"]) for group in trainer.optimizers[0].param_groups),
            "train/samples_per_second": (step - self._step) * samples / seconds,
            "train/data_wait_ratio": min(1.0, waited / seconds),
        }
        pl_module.log_dict(values, rank_zero_only=True)
        self._begin, self._step, self._waits = now, step, []


def _now(device: torch.device) -> Any:
    """Present moment: a CUDA event on the device, or the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    """Seconds between two moments of `_now`."""
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000.0


class ProgressCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Progress bar on a terminal; otherwise a line every ten seconds."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._bar: Any = None
        self._task: Any = None
        self._begin = self._last = 0.0
        self._first = 0
        self._smooth: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        if not trainer.is_global_zero:
            return
        self._begin = self._last = time.monotonic()
        self._first = trainer.global_step
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}"),
                TextColumn("{task.fields[speed]:.1f} samples/s"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=trainer.max_steps, completed=self._first, loss=float("nan"), speed=0.0)
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DiffusionModule, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        """Update the bar or print a line."""
        if not trainer.is_global_zero or not pl_module.history or not batch.last:
            return
        loss = pl_module.history[-1]["loss"]
        self._smooth = loss if self._smooth is None else 0.95 * self._smooth + 0.05 * loss
        now = time.monotonic()
        each = (now - self._begin) / max(1, trainer.global_step - self._first)
        speed = (batch.total or len(batch.rows)) / max(each, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, loss=self._smooth, speed=speed)
        elif now - self._last >= self.seconds:
            self._last = now
            left = each * (trainer.max_steps - trainer.global_step)
            print(
                f"train: step {trainer.global_step}/{trainer.max_steps}  loss {self._smooth:.4f}  "
                f"{speed:.1f} samples/s  {left:.0f} s left",
                flush=True,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
