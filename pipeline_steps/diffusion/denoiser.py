"""The network: a diffusers U-Net over latents, told what is heard by cross-attention and by its time embedding."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from pipeline_steps.diffusion.conditioning import AudioConditioner, SoundTokens
from pipeline_steps.diffusion.flow import guide, velocity_of_prediction

Prediction = Literal["latents", "velocity"]
TIMESTEPS = 1000
"""diffusers' convention: the U-Net is told time * 1000."""


def build_unet(
    latent_channels: int, latent_size: int, widths: tuple[int, ...], token_width: int, head_width: int
) -> UNet2DConditionModel:
    """A U-Net of one block a level; the finest level convolves only, all coarser ones cross-attend to the sound."""
    levels = len(widths)
    down = ["DownBlock2D" if level == 0 and levels > 1 else "CrossAttnDownBlock2D" for level in range(levels)]
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
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
    """Conditioner and U-Net. The U-Net predicts clean latents or velocities; callers get velocities."""

    def __init__(self, unet: UNet2DConditionModel, conditioner: AudioConditioner, prediction: Prediction) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.prediction = prediction

    def velocity(self, noisy: torch.Tensor, times: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Velocity [N, C, h, w] at noisy latents [N, C, h, w], times [N] and conditioner tokens [N, L, D]."""
        predicted: torch.Tensor = self.unet(noisy, times * TIMESTEPS, hidden, class_labels=hidden[:, 0], return_dict=False)[0]
        return predicted if self.prediction == "velocity" else velocity_of_prediction(noisy, predicted, times)

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
        return guide(*both.chunk(2), guidance_scale)
