"""The network: a linear guess, an MLP for the composition, and a diffusers U-Net that cross-attends to the sound."""

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

Prediction = Literal["residual", "velocity"]
"""What is learned: the rest after the Gaussian guess, by composer and U-Net; or the velocity, by the U-Net alone."""
TIMESTEPS = 1000
"""diffusers' convention: the U-Net is told time * 1000."""


@dataclass(frozen=True, slots=True)
class AudioConditioning:
    """What N sounds say: conditioner tokens [N, L, D] for the U-Net and a vector [N, E] for the composer."""

    hidden: torch.Tensor
    sound: torch.Tensor


def build_unet(
    in_channels: int, latent_channels: int, latent_size: int, widths: tuple[int, ...], token_width: int, head_width: int
) -> UNet2DConditionModel:
    """A U-Net of one block a level; the finest level convolves only, all coarser ones cross-attend to the sound.

    Its output is zero before training.
    """
    levels = len(widths)
    down = ["DownBlock2D" if level == 0 and levels > 1 else "CrossAttnDownBlock2D" for level in range(levels)]
    unet = UNet2DConditionModel(
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
        resnet_time_scale_shift="scale_shift",
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


class Denoiser(nn.Module):
    """Prior, composer, conditioner and U-Net; callers get velocities.

    Attributes:
        refining: whether the U-Net takes part; training switches it on when the composer is done.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioner: AudioConditioner,
        composer: MLPDenoiser,
        prior: GaussianDenoiser,
        prediction: Prediction,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.composer = composer
        self.prior = prior
        self.prediction = prediction
        self.refining = True

    def listen(self, tokens: ConditionerInput, heard: torch.Tensor) -> AudioConditioning:
        """What the sounds say; where `heard` [N] is false, what is said without one."""
        attended = self.refining or self.prediction == "velocity"
        hidden = self.conditioner(tokens, heard) if attended else tokens.frames
        return AudioConditioning(hidden, self.composer.encode_audio(tokens.summary, heard))

    def velocity(self, noisy: torch.Tensor, times: torch.Tensor, condition: AudioConditioning) -> torch.Tensor:
        """Velocity [N, C, h, w] at noisy latents [N, C, h, w] and times [N].

        The clean latents are estimated as guess + scale * (composer + U-Net); the velocity is (noisy - estimate) / time.
        """
        if self.prediction == "velocity":
            return self._unet(noisy, times, condition.hidden)
        with torch.no_grad():
            guess = self.prior.denoise(noisy, times)
            scale_in, scale_out = self.prior.scales(times)
            seen = (noisy - (1 - times)[:, None, None, None] * self.prior.mean) * scale_in
            time = times.clamp(min=MIN_TIME)[:, None, None, None]
        if not self.refining:
            composed: torch.Tensor = (noisy - guess - scale_out * self.composer(seen, times, condition.sound)) / time
            return composed
        with torch.no_grad():  # the composer is done; the U-Net learns what it leaves
            estimate = guess + scale_out * self.composer(seen, times, condition.sound)
        correction = self._unet(torch.cat([seen, estimate - self.prior.mean], 1), times, condition.hidden)
        refined: torch.Tensor = (noisy - estimate - scale_out * correction) / time
        return refined

    def _unet(self, seen: torch.Tensor, times: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        named: torch.Tensor = self.unet(seen, times * TIMESTEPS, hidden, class_labels=hidden[:, 0], return_dict=False)[0]
        return named

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, tokens: ConditionerInput, heard: torch.Tensor) -> torch.Tensor:
        """Velocity; where `heard` [N] is false the sound is withheld."""
        return self.velocity(noisy, times, self.listen(tokens, heard))

    def guided_velocity(
        self, noisy: torch.Tensor, time: float, given: AudioConditioning, withheld: AudioConditioning, guidance_scale: float
    ) -> torch.Tensor:
        """Classifier-free guided velocity at one time, from the conditions with and without the sound."""
        times = torch.full((len(noisy),), time, device=noisy.device)
        if guidance_scale == 1.0:
            return self.velocity(noisy, times, given)
        if guidance_scale == 0.0:
            return self.velocity(noisy, times, withheld)
        both = AudioConditioning(torch.cat([given.hidden, withheld.hidden]), torch.cat([given.sound, withheld.sound]))
        conditional, unconditional = self.velocity(torch.cat([noisy, noisy]), torch.cat([times, times]), both).chunk(2)
        return classifier_free_guidance(conditional, unconditional, guidance_scale)
