"""The network: a diffusers U-Net over latents, told what is heard by cross-attention and by its time embedding."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from pipeline_steps.diffusion.conditioning import AudioConditioner, SoundTokens
from pipeline_steps.diffusion.flow import guide, velocity_of_prediction
from pipeline_steps.diffusion.prior import MIN_TIME, GaussianPrior

Prediction = Literal["residual", "latents", "velocity"]
"""What the U-Net names: the rest after the Gaussian guess, the clean latents, or the velocity itself."""
TIMESTEPS = 1000
"""diffusers' convention: the U-Net is told time * 1000."""


def channels_seen(latent_channels: int, prediction: Prediction) -> int:
    """Input channels of the U-Net: the noisy latents, and beside them the Gaussian guess if there is one."""
    return 2 * latent_channels if prediction == "residual" else latent_channels


def build_unet(
    in_channels: int, latent_channels: int, latent_size: int, widths: tuple[int, ...], token_width: int, head_width: int
) -> UNet2DConditionModel:
    """A U-Net of one block a level; the finest level convolves only, all coarser ones cross-attend to the sound."""
    levels = len(widths)
    down = ["DownBlock2D" if level == 0 and levels > 1 else "CrossAttnDownBlock2D" for level in range(levels)]
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=in_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        layers_per_block=1,
        cross_attention_dim=token_width,
        attention_head_dim=[max(1, width // head_width) for width in widths],  # diffusers: the number of heads
        norm_num_groups=16,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=token_width,
    )


class Denoiser(nn.Module):
    """Prior, conditioner and U-Net. Callers get velocities, whatever the U-Net names."""

    def __init__(
        self, unet: UNet2DConditionModel, conditioner: AudioConditioner, prior: GaussianPrior, prediction: Prediction
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.prior = prior
        self.prediction = prediction

    def velocity(self, noisy: torch.Tensor, times: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Velocity [N, C, h, w] at noisy latents [N, C, h, w], times [N] and conditioner tokens [N, L, D]."""
        if self.prediction != "residual":
            named = self._name(noisy, times, hidden)
            return named if self.prediction == "velocity" else velocity_of_prediction(noisy, named, times)
        with torch.no_grad():
            guess = self.prior.denoise(noisy, times)
            scale_in, scale_out = self.prior.scales(times)
            keep = (1 - times)[:, None, None, None]
            seen = torch.cat([(noisy - keep * self.prior.mean) * scale_in, guess - self.prior.mean], 1)
            time = times.clamp(min=MIN_TIME)[:, None, None, None]
            linear = (noisy - guess) / time
        return linear - scale_out / time * self._name(seen, times, hidden)

    def _name(self, seen: torch.Tensor, times: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        named: torch.Tensor = self.unet(seen, times * TIMESTEPS, hidden, class_labels=hidden[:, 0], return_dict=False)[0]
        return named

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, tokens: SoundTokens, heard: torch.Tensor) -> torch.Tensor:
        """Velocity; where `heard` [N] is false the sound is withheld."""
        return self.velocity(noisy, times, self.conditioner(tokens, heard))

    def guided_velocity(
        self, noisy: torch.Tensor, time: float, hidden: torch.Tensor, silent: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        """Classifier-free guided velocity at one time. `hidden`, `silent` [N, L, D]: tokens with and without the sound."""
        times = torch.full((len(noisy),), time, device=noisy.device)
        if guidance_scale == 1.0:
            return self.velocity(noisy, times, hidden)
        if guidance_scale == 0.0:
            return self.velocity(noisy, times, silent)
        both = self.velocity(torch.cat([noisy, noisy]), torch.cat([times, times]), torch.cat([hidden, silent]))
        conditional, unconditional = both.chunk(2)
        return guide(conditional, unconditional, guidance_scale)
