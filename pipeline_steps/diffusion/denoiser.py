"""The network: a diffusers U-Net over latents, told what is heard by cross-attention and by its time embedding."""

from __future__ import annotations

from dataclasses import dataclass
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


def channels_seen(latent_channels: int, sketch_channels: int, prediction: Prediction) -> int:
    """Input channels of the U-Net: the noisy latents, the Gaussian guess beside them if there is one, and the sketch."""
    return (2 if prediction == "residual" else 1) * latent_channels + sketch_channels


@dataclass(frozen=True, slots=True)
class Condition:
    """What N sounds say: conditioner tokens [N, L, D] and the prior's mean latents [N, C, h, w]."""

    hidden: torch.Tensor
    mean: torch.Tensor


class Sketch(nn.Module):
    """A coarse map drawn from the sound alone, one linear layer: what should be where, before any noise is looked at.

    Attention and time embeddings speak to all positions alike; this is the short way from a sound to a layout.
    """

    def __init__(self, token_width: int, channels: int, size: int) -> None:
        super().__init__()
        self.settings = {"token_width": token_width, "channels": channels, "size": size}
        self.channels = channels
        self.size = size
        self.draw = nn.Linear(token_width, channels * size * size)

    def forward(self, summary: torch.Tensor) -> torch.Tensor:
        """Map [N, channels, size, size] of summary tokens [N, token_width]."""
        drawn: torch.Tensor = self.draw(summary)
        return drawn.view(len(summary), self.channels, self.size, self.size)


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
        resnet_time_scale_shift="scale_shift",
    )


class Denoiser(nn.Module):
    """Prior, conditioner, sketch and U-Net. Callers get velocities, whatever the U-Net names."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioner: AudioConditioner,
        sketch: Sketch,
        prior: GaussianPrior,
        prediction: Prediction,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner
        self.sketch = sketch
        self.prior = prior
        self.prediction = prediction

    def listen(self, tokens: SoundTokens, heard: torch.Tensor) -> Condition:
        """What the sounds say; where `heard` [N] is false, what is said without one."""
        return Condition(self.conditioner(tokens, heard), self.prior.expect(tokens.summary, heard))

    def velocity(self, noisy: torch.Tensor, times: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Velocity [N, C, h, w] at noisy latents [N, C, h, w] and times [N]."""
        if self.prediction != "residual":
            named = self._name(noisy, times, condition.hidden)
            return named if self.prediction == "velocity" else velocity_of_prediction(noisy, named, times)
        with torch.no_grad():
            guess = self.prior.denoise(noisy, times, condition.mean)
            scale_in, scale_out = self.prior.scales(times)
            keep = (1 - times)[:, None, None, None]
            seen = torch.cat([(noisy - keep * condition.mean) * scale_in, guess - self.prior.mean], 1)
            time = times.clamp(min=MIN_TIME)[:, None, None, None]
            linear = (noisy - guess) / time
        return linear - scale_out / time * self._name(seen, times, condition.hidden)

    def _name(self, seen: torch.Tensor, times: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([seen, self.sketch(hidden[:, 0])], 1)
        named: torch.Tensor = self.unet(seen, times * TIMESTEPS, hidden, class_labels=hidden[:, 0], return_dict=False)[0]
        return named

    def forward(self, noisy: torch.Tensor, times: torch.Tensor, tokens: SoundTokens, heard: torch.Tensor) -> torch.Tensor:
        """Velocity; where `heard` [N] is false the sound is withheld."""
        return self.velocity(noisy, times, self.listen(tokens, heard))

    def guided_velocity(
        self, noisy: torch.Tensor, time: float, given: Condition, withheld: Condition, guidance_scale: float
    ) -> torch.Tensor:
        """Classifier-free guided velocity at one time, from the conditions with and without the sound."""
        times = torch.full((len(noisy),), time, device=noisy.device)
        if guidance_scale == 1.0:
            return self.velocity(noisy, times, given)
        if guidance_scale == 0.0:
            return self.velocity(noisy, times, withheld)
        both = Condition(torch.cat([given.hidden, withheld.hidden]), torch.cat([given.mean, withheld.mean]))
        conditional, unconditional = self.velocity(torch.cat([noisy, noisy]), torch.cat([times, times]), both).chunk(2)
        return guide(conditional, unconditional, guidance_scale)
