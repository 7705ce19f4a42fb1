"""The Lightning module: one training step, its optimiser, and the history that a checkpoint carries."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.diffusion.codec import STRIDE, Codec
from pipeline_steps.diffusion.conditioning import AudioConditioner
from pipeline_steps.diffusion.denoiser import Denoiser, Sketch, build_unet, channels_seen
from pipeline_steps.diffusion.flow import at_time, bucket_means, velocity
from pipeline_steps.diffusion.prior import GaussianPrior
from pipeline_steps.train.augment import picture_views
from pipeline_steps.train.batches import Batch, PairedData
from pipeline_steps.train.config import Config, PictureConfig

BUCKETS = 4
"""Equal slices of time by which the loss is reported."""


def new_conditioner(config: Config) -> AudioConditioner:
    """An untrained conditioner; its fixed part is fitted later."""
    part = config.conditioner
    return AudioConditioner(part.frames, part.frame_components, part.tag_components, part.width, part.layers, part.dropout)


def new_denoiser(config: Config, conditioner: AudioConditioner) -> Denoiser:
    """An untrained denoiser around a conditioner; its prior is fitted later."""
    channels, size = config.codec.channels, config.picture_size // STRIDE
    width = config.conditioner.width
    sketch = Sketch(width, config.conditioner.sketch_channels, size)
    seen = channels_seen(channels, config.conditioner.sketch_channels, config.objective.prediction)
    unet = build_unet(seen, channels, size, config.unet.widths, width, config.unet.head_width)
    prior = GaussianPrior(channels, size, config.objective.coarse_channels, conditioner.summary_width)
    return Denoiser(unet, conditioner, sketch, prior, config.objective.prediction)


def fit_prior(prior: GaussianPrior, codec: Codec, data: PairedData, config: PictureConfig, seed: int, views: int = 6) -> float:
    """Fit the prior on several views of each training pair; see `GaussianPrior.fit`."""
    draws = torch.Generator().manual_seed(seed)
    latents, summaries = [], []
    with torch.no_grad():
        for view in range(views):
            latents.append(codec.encode(picture_views(data.pictures, config, draws)))
            variants = [data.tokens[sound].summary for sound in data.sounds]
            summaries.append(torch.stack([rows[view * len(rows) // views] for rows in variants]))
    groups = torch.tensor(data.sounds * views)
    return prior.fit(torch.cat(latents), torch.cat(summaries), groups)


class NotFiniteError(DataError):
    """The loss was not finite several times in a row; `details` holds the diagnosis."""


class DiffusionTraining(pl.LightningModule):  # type: ignore[misc, unused-ignore]
    """Learns velocities of the flow between latents and noise, given the sound or not.

    Args:
        config: the stage's section.
        denoiser: its conditioner's fixed part is fitted.
        digest: of everything that shapes this run; a checkpoint of another one is refused.
    """

    def __init__(self, config: Config, denoiser: Denoiser, digest: str) -> None:
        super().__init__()
        self.config = config
        self.denoiser = denoiser
        self.digest = digest
        self.history: list[dict[str, float]] = []
        """One row a step: loss and its means by time slice (NaN: no sample in it)."""
        self.validation: dict[str, float] = {}
        """Validation loss by step."""
        self.bad_steps = 0

    def losses(self, batch: Batch) -> torch.Tensor:
        """Mean squared error of the velocity by sample, [N]."""
        noisy = at_time(batch.latents, batch.noise, batch.times)
        predicted = self.denoiser(noisy, batch.times, batch.tokens, batch.heard)
        errors: torch.Tensor = (predicted.float() - velocity(batch.latents, batch.noise)).square().mean((1, 2, 3))
        return errors

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor | None:
        """Loss of one batch; None (no update) when it is not finite.

        Raises:
            NotFiniteError: `max_bad_steps` times in a row.
        """
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=self._draws(batch.step))))  # dropout: by step
        errors = self.losses(batch)
        loss = errors.mean()
        row = {"loss": float(loss.detach())}
        slices = bucket_means(errors, batch.times.cpu(), BUCKETS)
        row |= {f"loss_t{index}": float(value) for index, value in enumerate(slices)}
        self.history.append(row)
        if math.isfinite(row["loss"]):
            self.bad_steps = 0
            return loss
        self.bad_steps += 1
        if self.bad_steps >= self.config.max_bad_steps:
            raise NotFiniteError(
                f"the loss was not finite in {self.bad_steps} steps in a row, the last being step {batch.step}",
                "lower train.optimiser.learning_rate, or look at the batch named in the diagnosis",
                details={
                    "step": batch.step,
                    "rows": batch.rows,
                    "losses": [repr(float(error)) for error in errors.detach()],
                    "times": [round(float(time), 4) for time in batch.times],
                    "latents_finite": bool(torch.isfinite(batch.latents).all()),
                    "frames_finite": bool(torch.isfinite(batch.tokens.frames).all()),
                    "summary_finite": bool(torch.isfinite(batch.tokens.summary).all()),
                    "parameters_not_finite": [
                        name for name, value in self.named_parameters() if not bool(torch.isfinite(value).all())
                    ][:20],
                },
            )
        return None

    def _draws(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)

    @torch.no_grad()
    def validation_loss(self, batch: Batch) -> float:
        """Loss on a fixed batch with the weights as they are."""
        training = self.training
        self.eval()
        loss = float(self.losses(batch.to(self.device)).mean())
        self.train(training)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, fused; linear warm-up, then a cosine down to `final_share`."""
        part = self.config.optimiser
        optimiser = torch.optim.AdamW(
            self.denoiser.parameters(), lr=part.learning_rate, betas=(0.9, 0.99), weight_decay=part.weight_decay, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: rate_share(step, part.max_steps, part.warmup_steps, part.final_share)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient's norm. (Lightning's own clipping refuses fused optimisers under mixed precision.)"""
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.optimiser.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The run's digest and the history travel with the weights."""
        checkpoint["digest"] = self.digest
        checkpoint["history"] = [dict(row) for row in self.history]
        checkpoint["validation"] = dict(self.validation)

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


def rate_share(step: int, max_steps: int, warmup_steps: int, final_share: float) -> float:
    """Share of the highest learning rate at a step: linear up over `warmup_steps`, then a cosine to `final_share`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return final_share + (1.0 - final_share) * 0.5 * (1.0 + math.cos(math.pi * progress))
