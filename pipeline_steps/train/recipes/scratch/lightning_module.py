"""Lightning module of recipe `scratch`: velocity prediction of a rectified flow."""

from __future__ import annotations

from typing import Any

import torch

from pipeline_steps.diffusion.denoiser import Denoiser
from pipeline_steps.diffusion.rectified_flow import interpolate, velocity_target
from pipeline_steps.train.data import TrainingBatch
from pipeline_steps.train.lightning_module import DiffusionModule, OptimizerGroup
from pipeline_steps.train.recipes.scratch.config import ScratchPhases


class ScratchModule(DiffusionModule):
    """Trains the MLP in the first phase, U-Net and conditioner in the second.

    Args:
        denoiser: the fixed parts of conditioner and prior are fitted.
        phases: group of the recipe.
        arguments: those of `DiffusionModule`.
    """

    betas = (0.9, 0.99)

    def __init__(self, denoiser: Denoiser, phases: ScratchPhases, **arguments: Any) -> None:
        super().__init__(denoiser, **arguments)
        self.phases = phases

    def on_step_phase(self, step: int) -> None:
        """Switch the U-Net on after the phase of the MLP."""
        self.denoiser.use_unet = step >= self.phases.mlp.max_steps

    def per_sample_loss(self, batch: TrainingBatch) -> torch.Tensor:
        """Mean squared error of the velocity per sample, [N]."""
        noisy = interpolate(batch.latents, batch.noise, batch.times)
        predicted = self.denoiser(noisy, batch.times, batch.audio, batch.condition_mask)
        errors: torch.Tensor = (predicted.float() - velocity_target(batch.latents, batch.noise)).square().mean((1, 2, 3))
        return errors

    def optimizer_groups(self) -> list[OptimizerGroup]:
        """The MLP; U-Net and conditioner."""
        second = [*self.denoiser.unet.parameters(), *self.denoiser.conditioner.parameters()]
        return [
            OptimizerGroup(self.denoiser.mlp.parameters(), 0, self.phases.mlp),
            OptimizerGroup(second, self.phases.mlp.max_steps, self.phases.unet),
        ]
