"""Lightning module of a training run: training and validation step, optimizer, loss history, checkpoint contents."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.train.config_groups import OptimizerConfig, PhaseConfig
from pipeline_steps.train.data import TrainingBatch

BUCKETS = 4
"""Equal intervals of time by which the loss is reported."""
LOG_EVERY_N_STEPS = 10


class NonFiniteLossError(DataError):
    """The loss was not finite several times in a row; `details` contains the diagnosis."""


class DiffusionModule(pl.LightningModule):  # type: ignore[misc, unused-ignore]
    """Base of the modules of all recipes.

    Args:
        denoiser: network that is trained.
        digest: identity of the run; checkpoints of another run are rejected.
        phase: steps and learning rate.
        optimizer: shared optimizer settings.
        seed: of dropout.
        max_nonfinite_steps: consecutive steps with a loss that is not finite before training stops.

    Attributes:
        history: one row per step: loss and its means by time interval (NaN: no sample in it).
        validation: validation loss by step.
        compiled: whether the U-Net is compiled. Validation then runs eagerly, because its shapes would be compiled again.
    """

    def __init__(
        self, denoiser: Any, digest: str, phase: PhaseConfig, optimizer: OptimizerConfig, seed: int, max_nonfinite_steps: int
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.digest = digest
        self.phase = phase
        self.optimizer_config = optimizer
        self.seed = seed
        self.max_nonfinite_steps = max_nonfinite_steps
        self.history: list[dict[str, float]] = []
        self.validation: dict[str, float] = {}
        self.compiled = False
        self._nonfinite_steps = 0
        self._loss_sums: list[torch.Tensor] = []
        self._skip_step = False

    @property
    def unet(self) -> Any:
        """diffusers' U-Net, which takes most of the time: memory format, checkpointing and compilation apply to it."""
        return self.denoiser.unet

    @property
    def objective(self) -> str:
        """Name of the loss: prediction target and weighting. Losses of different objectives cannot be compared."""
        return type(self).__name__

    def per_sample_loss(self, batch: TrainingBatch) -> torch.Tensor:
        """Loss of each sample, [N]."""
        raise NotImplementedError

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> torch.Tensor:
        """Loss of one microbatch.

        If one microbatch of a step is not finite, all microbatches and processes skip the step: the loss is a constant and the
        gradients are dropped before the optimizer step. Lightning accepts no None from several processes.

        Raises:
            NonFiniteLossError: `max_nonfinite_steps` steps in a row were not finite.
        """
        self._seed_dropout(batch)
        errors = self.per_sample_loss(batch)
        finite, row = self._reduce_losses(batch, errors)
        if row:
            self._record_loss(row, batch, errors)
        if finite:
            return errors.mean() * batch.weight
        self._skip_step = True
        return torch.zeros((), device=errors.device, requires_grad=True)

    def _reduce_losses(self, batch: TrainingBatch, errors: torch.Tensor) -> tuple[bool, dict[str, float]]:
        """Whether this microbatch is finite in every process; after the last microbatch also the history row of the step."""
        sums = bucket_sums(errors, batch.times, BUCKETS)
        if batch.parts > self.trainer.accumulate_grad_batches:  # several processes
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        sums = sums.cpu()
        self._loss_sums.append(sums)
        finite = bool(torch.isfinite(sums).all())
        if not batch.last:
            return finite, {}
        step = torch.stack(self._loss_sums).sum(0)
        self._loss_sums = []
        row = {"loss": float(step[0].sum() / step[1].sum())}
        return finite, row | {f"loss_t{i}": float(value) for i, value in enumerate(step[0] / step[1])}

    def _record_loss(self, row: dict[str, float], batch: TrainingBatch, errors: torch.Tensor) -> None:
        self.history.append(row)
        recent = [past["loss"] for past in self.history[-LOG_EVERY_N_STEPS:]]
        self.log("train/loss", float(np.mean(recent)), rank_zero_only=True)
        if math.isfinite(row["loss"]):
            self._nonfinite_steps = 0
            return
        self._nonfinite_steps += 1
        if self._nonfinite_steps >= self.max_nonfinite_steps:
            raise NonFiniteLossError(
                f"the loss was not finite in {self._nonfinite_steps} steps in a row, the last being step {batch.step}",
                "lower learning_rate of the recipe, or check the pairs named in the diagnosis",
                details=self._diagnosis(batch, errors.detach()),
            )

    def _diagnosis(self, batch: TrainingBatch, errors: torch.Tensor) -> dict[str, object]:
        """Details of a batch whose loss is not finite."""

        def finite(value: torch.Tensor) -> bool:
            return bool(torch.isfinite(value).all())

        audio = {f"{field.name}_finite": finite(getattr(batch.audio, field.name)) for field in fields(batch.audio)}
        broken = [name for name, value in self.named_parameters() if not finite(value)]
        return {
            "step": batch.step,
            "rows": batch.rows,
            "losses": [repr(float(error)) for error in errors],
            "times": [round(float(time), 4) for time in batch.times],
            "latents_finite": finite(batch.latents),
            **audio,
            "parameters_not_finite": broken[:20],
        }

    def _seed_dropout(self, batch: TrainingBatch) -> None:
        """Make dropout a function of the step and of the microbatch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch.step)
        for _ in range(batch.part + 1):
            seed = int(torch.randint(2**62, (1,), generator=generator))
        torch.manual_seed(seed)

    def on_validation_start(self) -> None:
        """Run compiled parts eagerly."""
        if self.compiled:
            torch.compiler.set_stance("force_eager")

    def on_validation_end(self) -> None:
        """Run compiled parts compiled again."""
        if self.compiled:
            torch.compiler.set_stance("default")

    def validation_step(self, batch: TrainingBatch | None, batch_idx: int) -> None:
        """Loss of the validation batch with averaged weights, in as many parts as a step; NaN without validation pairs."""
        loss = math.nan
        if batch is not None:
            size = -(-len(batch) // self.trainer.accumulate_grad_batches)
            parts = [batch.select(slice(start, start + size)) for start in range(0, len(batch), size)]
            loss = float(torch.cat([self.per_sample_loss(part) for part in parts]).mean())
        self.validation[str(self.trainer.global_step)] = loss
        self.log("train/validation_loss", loss, batch_size=1, rank_zero_only=True)

    def configure_optimizers(self) -> Any:
        """AdamW, fused; the learning rate warms up and decays."""
        config, phase = self.optimizer_config, self.phase
        optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=phase.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        factor = partial(
            warmup_cosine, max_steps=phase.max_steps, warmup_steps=config.lr_warmup_steps, min_ratio=config.min_lr_ratio
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient norm. Lightning's own clipping rejects fused optimizers under mixed precision."""
        if self._skip_step:
            self._skip_step = False
            optimizer.zero_grad(set_to_none=True)  # parameters without gradients are not updated
            return
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.optimizer_config.max_grad_norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the digest of the run, the number of microbatches and the history."""
        checkpoint["digest"] = self.digest
        checkpoint["accumulate_grad_batches"] = self.trainer.accumulate_grad_batches
        checkpoint["history"] = [dict(row) for row in self.history]
        checkpoint["validation"] = dict(self.validation)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history.

        Raises:
            IntegrityError: the checkpoint belongs to another configuration, other data or other code.
        """
        if checkpoint.get("digest") != self.digest:
            raise IntegrityError(
                f"the checkpoint belongs to run {checkpoint.get('digest')}, this is run {self.digest}",
                "set train.resume_from_checkpoint to null, or restore the parameters, data and code of that run",
            )
        self.history = [dict(row) for row in checkpoint["history"]]
        self.validation = dict(checkpoint["validation"])


def warmup_cosine(step: int, max_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Learning rate at a step, relative to the highest: linear warmup, then cosine decay to `min_ratio`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))


def bucket_sums(losses: torch.Tensor, times: torch.Tensor, buckets: int) -> torch.Tensor:
    """Sums and counts [2, buckets] of losses [N] in equal intervals of times [N], in double precision.

    Sums and counts of several batches can be added.
    """
    index = (times * buckets).long().clamp(max=buckets - 1)
    both = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)])
    return torch.zeros(2, buckets, dtype=torch.float64, device=losses.device).index_add_(1, index, both)
