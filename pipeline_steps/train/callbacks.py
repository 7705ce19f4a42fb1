"""What happens beside the steps: averaged weights, samples and validation, metrics, progress."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.train.compile_probe import force_eager
from pipeline_steps.train.data import TrainingBatch
from pipeline_steps.train.fsdp import ShardedEMA, drop_untrained_optimizer_state, load_full_state_dict, reshard, sync_full_copy
from pipeline_steps.train.lightning_module import DiffusionModule


class MetricLogger(Protocol):
    """What training says about itself; `pipeline_steps.tracking` gives one."""

    def log_metrics(self, values: Any, step: int = 0) -> None:
        """Numbers at a step."""

    def log_image(self, key: str, image: ByteArray, step: int = 0) -> None:
        """A picture at a step."""


EVERY = 4
"""Steps between updates of the average: nobody sees the difference, and each update passes over all weights."""


class EMACallback(EMAWeightAveraging):  # type: ignore[misc, unused-ignore]
    """Lightning's exponential moving average, once an optimiser step; `averaged` lends the averaged weights for a while.

    Where processes hold the model together (fsdp), which Lightning's callback cannot, each averages its own pieces.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay**EVERY, use_buffers=False, update_every_n_steps=EVERY)
        self._decay = decay**EVERY

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the model, unless it will be cut."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overrides the configure_model.*")  # it does nothing here
            super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy the pieces of this process."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            self._average_model = ShardedEMA(pl_module, self._decay)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """As Lightning: `state_dict` is the average, `current_model_state` the weights as they are; both whole."""
        pieces: Any = self._average_model
        if not isinstance(pieces, ShardedEMA):
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            return
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        self._swap_models(pl_module)
        checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        self._swap_models(pl_module)
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(pieces.updates)}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take both back. Lightning's strategy has already put the average into the model."""
        pieces: Any = self._average_model
        if not isinstance(pieces, ShardedEMA):
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
            return
        pieces.take(pl_module)
        pieces.updates = int(checkpoint["averaging_state"]["n_averaged"])
        load_full_state_dict(pl_module, checkpoint["current_model_state"])
        drop_untrained_optimizer_state(pl_module, trainer.optimizers[0], checkpoint["optimizer_states"][0]["state"])

    @contextmanager
    def ema_scope(self, module: DiffusionModule) -> Iterator[None]:
        """Within the block the module has the averaged weights (and the whole copy of a cut one, in process 0)."""
        self._swap_models(module)
        try:
            if isinstance(self._average_model, ShardedEMA):
                sync_full_copy(module)
            yield
        finally:
            reshard(module)
            self._swap_models(module)


class SampleGridCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Every n steps, with averaged weights: a grid of drawn pictures and the validation loss.

    It runs before the checkpoint of the same step and is a function of the weights alone, so a resumed run repeats it exactly.
    """

    def __init__(
        self,
        every: int,
        averages: EMACallback,
        draw: Callable[[], ByteArray],
        keep: Callable[[int, ByteArray], None],
        held_out: TrainingBatch | None,
        tracker: MetricLogger,
    ) -> None:
        self.every = every
        self.averages = averages
        self.draw = draw
        self.keep = keep
        self.held_out = held_out
        self.tracker = tracker

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """See the class."""
        step = trainer.global_step
        if str(step) in pl_module.validation or not step or (step % self.every and step != trainer.max_steps):
            return
        grid = None
        with self.averages.ema_scope(pl_module), force_eager(pl_module.compiled):
            pl_module.eval()
            if trainer.is_global_zero:
                grid = self.draw()
            with trainer.precision_plugin.forward_context():  # as in a step; a pipeline draws in a precision of its own
                loss = pl_module.validation_loss(self.held_out) if self.held_out is not None else float("nan")
            pl_module.train()
        pl_module.validation[str(step)] = loss
        if grid is not None:
            self.keep(step, grid)
            self.tracker.log_image("samples/grid", grid, step=step)
            self.tracker.log_metrics({"train/validation_loss": loss}, step=step)


class MetricsCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Loss, learning rate, speed and the share of time spent waiting for data, to the tracker every n steps."""

    def __init__(self, every: int, tracker: MetricLogger, waited: Callable[[], float] = lambda: 0.0) -> None:
        self.every = every
        self.tracker = tracker
        self.waited = waited
        self._mark = time.monotonic()
        self._waited = 0.0
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._mark, self._waited, self._step = time.monotonic(), self.waited(), trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: DiffusionModule, outputs: Any, batch: TrainingBatch, batch_idx: int
    ) -> None:
        """See the class."""
        step = trainer.global_step
        if step % self.every or step == self._step or not trainer.is_global_zero or not pl_module.history:
            return
        now, waited = time.monotonic(), self.waited()
        spent = max(now - self._mark, 1e-9)
        recent = pl_module.history[-self.every :]
        samples = batch.total or len(batch.rows)
        values = {
            "train/loss": float(np.mean([row["loss"] for row in recent])),
            "train/learning_rate": max(float(group["lr"]) for group in trainer.optimizers[0].param_groups),
            "train/samples_per_second": (step - self._step) * samples / spent,
            "train/wait_share": min(1.0, (waited - self._waited) / spent),
        }
        self._mark, self._waited, self._step = now, waited, step
        self.tracker.log_metrics(values, step=step)


class ProgressCallback(Callback):  # type: ignore[misc, unused-ignore]
    """A bar with loss, samples per second and time left on a terminal; elsewhere a line every ten seconds."""

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
        """Move it."""
        if not trainer.is_global_zero or not pl_module.history or not batch.last:
            return
        loss = pl_module.history[-1]["loss"]
        self._smooth = loss if self._smooth is None else 0.95 * self._smooth + 0.05 * loss
        now = time.monotonic()
        done = max(1, trainer.global_step - self._first)
        each = (now - self._begin) / done
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
        """Close it."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close it."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
