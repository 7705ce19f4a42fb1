"""Denoiser of recipe `scratch`: Gaussian prior, MLP for the composition, diffusers U-Net with cross-attention to the audio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from pipeline_steps.diffusion.audio_conditioner import AudioConditioner, ConditionerInput
from pipeline_steps.diffusion.gaussian_prior import MIN_TIME, GaussianDenoiser
from pipeline_steps.diffusion.mlp_denoiser import MLPDenoiser
from pipeline_steps.diffusion.rectified_flow import classifier_free_guidance

PredictionType = Literal["residual", "velocity"]
"""residual: MLP and U-Net predict what the Gaussian prior leaves; velocity: the U-Net alone predicts the velocity."""
TIMESTEPS = 1000
"""diffusers' convention: the U-Net's timestep is time * 1000."""


@dataclass(frozen=True, slots=True)
class AudioConditioning:
    """Conditioning on N clips: tokens [N, L, D] for the U-Net and a vector [N, E] for the MLP."""

    hidden: torch.Tensor
    pooled: torch.Tensor


def build_unet(
    in_channels: int,
    latent_channels: int,
    latent_size: int,
    block_out_channels: tuple[int, ...],
    token_width: int,
    attention_head_dim: int,
) -> UNet2DConditionModel:
    """U-Net with one block per level; all levels except the finest cross-attend to the audio. Its initial output is zero."""
    levels = len(block_out_channels)
    down = ["DownBlock2D" if level == 0 and levels > 1 else "CrossAttnDownBlock2D" for level in range(levels)]
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=in_channels,
        out_channels=latent_channels,
        block_out_channels=block_out_channels,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        layers_per_block=1,
        cross_attention_dim=token_width,
        # In diffusers this argument is the number of heads.
        attention_head_dim=[max(1, width // attention_head_dim) for width in block_out_channels],
        norm_num_groups=16,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=token_width,
        resnet_time_scale_shift="scale_shift",
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


class Denoiser(nn.Module):
    """Prior, MLP, conditioner and U-Net; its output is a velocity.

    Attributes:
        use_unet: whether the U-Net takes part; training switches it on after the phase of the MLP.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioner: AudioConditioner,
        mlp: MLPDenoiser,
        prior: GaussianDenoiser,
        prediction_type: PredictionType,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.mlp = mlp
        self.prior = prior
        self.prediction_type = prediction_type
        self.use_unet = True

    def encode_condition(self, inputs: ConditionerInput, condition_mask: torch.Tensor) -> AudioConditioning:
        """Conditioning on audio; the learned null condition where `condition_mask` [N] is false."""
        attended = self.use_unet or self.prediction_type == "velocity"
        hidden = self.conditioner(inputs, condition_mask) if attended else inputs.frames
        return AudioConditioning(hidden, self.mlp.embed_audio(inputs.summary, condition_mask))

    def velocity(self, noisy: torch.Tensor, times: torch.Tensor, condition: AudioConditioning) -> torch.Tensor:
        """Velocity [N, C, h, w] at noisy latents [N, C, h, w] and times [N].

        With prediction type `residual` the clean latents are prior + scale * (MLP + U-Net), and the velocity is
        (noisy - clean) / time.
        """
        if self.prediction_type == "velocity":
            return self._unet(noisy, times, condition.hidden)
        with torch.no_grad():
            guess = self.prior.denoise(noisy, times)
            scale_in, scale_out = self.prior.preconditioning(times)
            scaled = (noisy - (1 - times)[:, None, None, None] * self.prior.mean) * scale_in
            time = times.clamp(min=MIN_TIME)[:, None, None, None]
        if not self.use_unet:
            composed: torch.Tensor = (noisy - guess - scale_out * self.mlp(scaled, times, condition.pooled)) / time
            return composed
        with torch.no_grad():  # the MLP is trained; the U-Net learns its residual
            estimate = guess + scale_out * self.mlp(scaled, times, condition.pooled)
        correction = self._unet(torch.cat([scaled, estimate - self.prior.mean], 1), times, condition.hidden)
        refined: torch.Tensor = (noisy - estimate - scale_out * correction) / time
        return refined

    def _unet(self, inputs: torch.Tensor, times: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.unet(inputs, times * TIMESTEPS, hidden, class_labels=hidden[:, 0], return_dict=False)[0]
        return output

    def forward(
        self, noisy: torch.Tensor, times: torch.Tensor, inputs: ConditionerInput, condition_mask: torch.Tensor
    ) -> torch.Tensor:
        """Velocity; unconditional where `condition_mask` [N] is false."""
        return self.velocity(noisy, times, self.encode_condition(inputs, condition_mask))

    def guided_velocity(
        self,
        noisy: torch.Tensor,
        time: float,
        conditional: AudioConditioning,
        unconditional: AudioConditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        """Velocity at one time with classifier-free guidance."""
        times = torch.full((len(noisy),), time, device=noisy.device)
        if guidance_scale == 1.0:
            return self.velocity(noisy, times, conditional)
        if guidance_scale == 0.0:
            return self.velocity(noisy, times, unconditional)
        both = AudioConditioning(
            torch.cat([conditional.hidden, unconditional.hidden]), torch.cat([conditional.pooled, unconditional.pooled])
        )
        with_audio, without = self.velocity(torch.cat([noisy, noisy]), torch.cat([times, times]), both).chunk(2)
        return classifier_free_guidance(with_audio, without, guidance_scale)
