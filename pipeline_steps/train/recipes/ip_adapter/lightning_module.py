"""Lightning module of recipe `ip_adapter`: the backbone's own objective, trained on the adapter alone."""

from __future__ import annotations

from typing import Any

import torch

from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
from pipeline_steps.train.data import TrainingBatch
from pipeline_steps.train.lightning_module import DiffusionModule


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weights [N] of the squared errors, min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    min(snr, gamma) / snr for epsilon, / (snr + 1) for velocities. Pure noise (snr 0) has the limits 1 and 0.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return torch.where(snr > 0, clipped / snr.clamp(min=1e-20), 1.0)


class AudioIPAdapterModule(DiffusionModule):
    """Trains keys, values and resampler to predict the backbone's target (noise or velocity) at its noise levels.

    Args:
        adapter: in its loaded backbone.
        snr_gamma: of the recipe's group.
        arguments: those of `DiffusionModule`.
    """

    def __init__(self, adapter: AudioIPAdapter, snr_gamma: float, **arguments: Any) -> None:
        super().__init__(adapter, **arguments)
        self.snr_gamma = snr_gamma

    def on_fit_start(self) -> None:
        """Move the backbone to the device: it is no submodule."""
        self.denoiser.backbone.to(self.device)

    @property
    def unet(self) -> Any:
        """U-Net of the backbone."""
        return self.denoiser.backbone.unet

    @property
    def objective(self) -> str:
        """Prediction target and weighting, e.g. `epsilon_min_snr_5`."""
        return f"{self.denoiser.backbone.prediction_type}_min_snr_{self.snr_gamma:g}"

    def per_sample_loss(self, batch: TrainingBatch) -> torch.Tensor:
        """Squared error per sample, weighted by signal-to-noise ratio, [N]."""
        backbone = self.denoiser.backbone
        schedule = backbone.noise_scheduler
        timesteps = (batch.times * schedule.config.num_train_timesteps).long()
        noisy = schedule.add_noise(batch.latents, batch.noise, timesteps)
        epsilon = backbone.prediction_type == "epsilon"
        target = batch.noise if epsilon else schedule.get_velocity(batch.latents, batch.noise, timesteps)
        output = self.denoiser(noisy, timesteps, batch.audio, batch.condition_mask)
        signal = schedule.alphas_cumprod.to(timesteps.device)[timesteps]  # fraction of the signal in the variance
        weights = min_snr_weights(signal / (1 - signal), self.snr_gamma, backbone.prediction_type)
        errors: torch.Tensor = (output.float() - target).square().mean((1, 2, 3)) * weights
        return errors
