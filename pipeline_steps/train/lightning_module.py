"""The Lightning module: one training step, its optimiser, and the history that a checkpoint carries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
import torch

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.diffusion.audio_conditioner import AudioConditioner
from pipeline_steps.diffusion.autoencoder import STRIDE, Codec
from pipeline_steps.diffusion.denoiser import Denoiser, build_unet
from pipeline_steps.diffusion.gaussian_prior import GaussianDenoiser
from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser
from pipeline_steps.diffusion.rectified_flow import bucket_means, bucket_sums, interpolate, velocity_target
from pipeline_steps.train.augmentations import augment_images
from pipeline_steps.train.config import ImageAugmentationConfig, TrainConfig
from pipeline_steps.train.data import TrainingBatch

BUCKETS = 4
"""Equal slices of time by which the loss is reported."""


def build_conditioner(config: TrainConfig) -> AudioConditioner:
    """An untrained conditioner; its fixed part is fitted later."""
    part = config.conditioner
    return AudioConditioner(**part.model_dump())


def build_denoiser(config: TrainConfig, conditioner: AudioConditioner) -> Denoiser:
    """An untrained denoiser around a conditioner; its prior is fitted later."""
    channels, size = config.codec.channels, config.picture_size // STRIDE
    width = config.conditioner.width
    seen = 2 * channels if config.objective.prediction == "residual" else channels
    unet = build_unet(seen, channels, size, config.unet.widths, width, config.unet.head_width)
    composer = MLPDenoiser(
        channels,
        size,
        conditioner.summary_width,
        config.composer.width,
        config.composer.blocks,
        config.conditioner.dropout,
    )
    prior = GaussianDenoiser(channels, size, config.objective.coarse_channels)
    return Denoiser(unet, conditioner, composer, prior, config.objective.prediction)


def fit_prior(
    prior: GaussianDenoiser, codec: Codec, pictures: torch.Tensor, config: ImageAugmentationConfig, seed: int, views: int = 8
) -> None:
    """Fit the prior on the latents of several views of each training picture [N, 3, H, W]."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        prior.fit(torch.cat([codec.encode(augment_images(pictures, config, draws)) for _ in range(views)]))


class NonFiniteLossError(DataError):
    """The loss was not finite several times in a row; `details` holds the diagnosis."""


class DiffusionModule(pl.LightningModule):  # type: ignore[misc, unused-ignore]
    """Learns velocities of the flow between latents and noise, given the sound or not: the recipe `scratch`.

    The recipe `adapter` (`AdapterTraining`) changes what is learned and at which rate; steps, faults, history and checkpoints
    are these.

    Args:
        config: the stage's section.
        denoiser: its conditioner's fixed part is fitted.
        digest: of everything that shapes this run; a checkpoint of another one is refused.
    """

    def __init__(self, config: TrainConfig, denoiser: Denoiser | AudioIPAdapter, digest: str) -> None:
        super().__init__()
        self.config = config
        self.denoiser: Any = denoiser
        self.digest = digest
        self.history: list[dict[str, float]] = []
        """One row a step: loss and its means by time slice (NaN: no sample in it)."""
        self.validation: dict[str, float] = {}
        """Validation loss by step."""
        self.bad_steps = 0
        self.compiled: bool | None = None
        """Whether parts run compiled; None: not decided. A resumed run keeps the decision: compiling moves the last digits."""
        self.mesh_blocks: Callable[[Any], None] | None = None
        """Cuts the model among processes, when they hold it together; the uncut one is then kept in `whole`."""
        self.whole: list[Denoiser] = []
        self.speed: dict[str, Any] = {}
        """What was decided about speed, and on what grounds."""
        self._tally: list[torch.Tensor] = []
        self._dropped = False

    def configure_model(self) -> None:
        """Lightning's hook before the optimiser exists: where processes hold the model together, it is cut here."""
        cut, self.mesh_blocks = self.mesh_blocks, None
        if cut is not None:
            cut(self)

    @property
    def unet(self) -> Any:
        """diffusers' U-Net, where the time goes: what is compiled, laid out anew, computed twice."""
        return self.denoiser.unet

    @property
    def unet_steps(self) -> tuple[int, int]:
        """The first step in which the U-Net works, and how many there are."""
        return self.config.optimiser.compose.steps, self.config.optimiser.refine.steps

    def prepare(self, step: int) -> None:
        """What changes in the course of training: the phase."""
        self.denoiser.refining = step >= self.config.optimiser.compose.steps

    def losses(self, batch: TrainingBatch) -> torch.Tensor:
        """Mean squared error of the velocity by sample, [N]."""
        noisy = interpolate(batch.latents, batch.noise, batch.times)
        predicted = self.denoiser(noisy, batch.times, batch.tokens, batch.heard)
        errors: torch.Tensor = (predicted.float() - velocity_target(batch.latents, batch.noise)).square().mean((1, 2, 3))
        return errors

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> torch.Tensor | None:
        """Loss of one microbatch; None (no update) when it is not finite.

        A step of several microbatches or processes is left out by all of them if it is not finite in one: Lightning takes no
        None there, so such a loss is a constant, and the gradients are dropped before the optimiser moves.

        Raises:
            NotFiniteError: in `max_bad_steps` steps in a row.
        """
        self._seed_dropout(batch)
        self.prepare(batch.step)
        errors = self.losses(batch)
        loss = errors.mean()
        if batch.parts == 1:
            row = {"loss": float(loss.detach())}
            slices = bucket_means(errors, batch.times.cpu(), BUCKETS)
            row |= {f"loss_t{index}": float(value) for index, value in enumerate(slices)}
            finite = math.isfinite(row["loss"])
        else:
            finite, row = self._share_losses(batch, errors.detach())
        if row:
            self._remember(row, batch, errors)
        if finite:
            return loss * batch.weight
        if batch.parts == 1:
            return None
        self._dropped = True
        return torch.zeros((), device=loss.device, requires_grad=True)

    def _share_losses(self, batch: TrainingBatch, errors: torch.Tensor) -> tuple[bool, dict[str, float]]:
        """Whether this microbatch is finite in every process, and the whole step's row after its last microbatch."""
        sums = bucket_sums(errors, batch.times, BUCKETS)
        if batch.parts > self.trainer.accumulate_grad_batches:  # several processes
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        sums = sums.cpu()
        self._tally.append(sums)
        finite = bool(torch.isfinite(sums).all())
        if not batch.last:
            return finite, {}
        step = torch.stack(self._tally).sum(0)
        self._tally = []
        row = {"loss": float(step[0].sum() / step[1].sum())}
        row |= {f"loss_t{index}": float(value) for index, value in enumerate(step[0] / step[1])}
        return finite, row

    def _remember(self, row: dict[str, float], batch: TrainingBatch, errors: torch.Tensor) -> None:
        self.history.append(row)
        if math.isfinite(row["loss"]):
            self.bad_steps = 0
            return
        self.bad_steps += 1
        if self.bad_steps >= self.config.max_bad_steps:
            raise NonFiniteLossError(
                f"the loss was not finite in {self.bad_steps} steps in a row, the last being step {batch.step}",
                "lower train.optimiser.learning_rate, or look at the batch named in the diagnosis",
                details={
                    "step": batch.step,
                    "rows": batch.rows,
                    "losses": [repr(float(error)) for error in errors.detach()],
                    "times": [round(float(time), 4) for time in batch.times],
                    "latents_finite": bool(torch.isfinite(batch.latents).all()),
                    **{
                        f"{field.name}_finite": bool(torch.isfinite(getattr(batch.tokens, field.name)).all())
                        for field in fields(batch.tokens)
                    },
                    "parameters_not_finite": [
                        name for name, value in self.named_parameters() if not bool(torch.isfinite(value).all())
                    ][:20],
                },
            )

    def _seed_dropout(self, batch: TrainingBatch) -> None:
        """Dropout is a function of the step and of the slice of it."""
        draws = self._draws(batch.step)
        for _ in range(batch.part + 1):
            seed = int(torch.randint(2**62, (1,), generator=draws))
        torch.manual_seed(seed)

    def _draws(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)

    @torch.no_grad()
    def validation_loss(self, batch: TrainingBatch) -> float:
        """Loss on a fixed batch with the weights as they are."""
        training = self.training
        self.eval()
        loss = float(self.losses(batch.to(self.device)).mean())
        self.train(training)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, fused, one group a phase; in its phase each rate warms up, then falls along a cosine to `final_share`."""
        part = self.config.optimiser
        composer = list(self.denoiser.composer.parameters())
        rest = [*self.denoiser.unet.parameters(), *self.denoiser.conditioner.parameters()]
        optimiser = torch.optim.AdamW(
            [{"params": composer, "lr": part.compose.learning_rate}, {"params": rest, "lr": part.refine.learning_rate}],
            betas=(0.9, 0.99),
            weight_decay=part.weight_decay,
            fused=True,
        )

        def share(first: int, steps: int) -> Callable[[int], float]:
            return lambda step: warmup_cosine(step - first, steps, part.warmup_steps, part.final_share)

        shares = [share(0, part.compose.steps), share(part.compose.steps, part.refine.steps)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, shares)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient's norm. (Lightning's own clipping refuses fused optimisers under mixed precision.)"""
        if self._dropped:
            self._dropped = False
            optimizer.zero_grad(set_to_none=True)  # without gradients it moves nothing
            return
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.optimiser.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The run's digest and the history travel with the weights."""
        checkpoint["digest"] = self.digest
        checkpoint["history"] = [dict(row) for row in self.history]
        checkpoint["validation"] = dict(self.validation)
        checkpoint["compiled"] = self.compiled

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the history back.

        Raises:
            IntegrityError: the checkpoint belongs to another configuration, other data or other code.
        """
        if checkpoint.get("digest") != self.digest:
            raise IntegrityError(
                f"the checkpoint belongs to run {checkpoint.get('digest')}, this is run {self.digest}",
                "unset train.resume_from, or restore the parameters, data and code of that run",
            )
        self.history = [dict(row) for row in checkpoint["history"]]
        self.validation = dict(checkpoint["validation"])
        self.compiled = checkpoint.get("compiled")


def warmup_cosine(step: int, steps: int, warmup_steps: int, final_share: float) -> float:
    """Share of a phase's highest rate at its step: linear up, then a cosine to `final_share`; 0 before the phase."""
    if step < 0:
        return 0.0
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
