"""Training of the codec: the linear part is fitted in closed form, the rest by a few hundred gradient steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from pipeline_steps.diffusion.autoencoder import Codec, PatchPCAAutoencoder, TinyAutoencoder, psnr
from pipeline_steps.train.augmentations import augment_images
from pipeline_steps.train.config import AutoencoderConfig, ImageAugmentationConfig
from pipeline_steps.train.data import batch_indices, step_generator

VIEWS = ImageAugmentationConfig(mirror=0.5, scale=0.12, shift=0.06)
"""The codec sees varied pictures whatever the denoiser sees: it must serve any position of an edge in a patch."""


def build_autoencoder(config: AutoencoderConfig, seed: int) -> Codec:
    """An untrained codec of the configured kind.

    Torch's generator is afterwards in a state that depends on the arguments alone, and training the codec draws nothing from
    it: what is initialised next is the same whether a run trains its codec or finds it trained.
    """
    torch.manual_seed(int(step_generator(seed, "codec", 0).initial_seed()))
    if config.kind == "tiny":
        return TinyAutoencoder(config.channels, config.width)
    return PatchPCAAutoencoder(config.channels, config.whitening, config.width if config.steps else 0)


def edge_loss(pictures: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of finite differences at full and half resolution: what a blur or a seam changes."""
    total = pictures.new_zeros(())
    for level in range(2):
        if level:
            pictures, reference = nn.functional.avg_pool2d(pictures, 2), nn.functional.avg_pool2d(reference, 2)
        for axis in (2, 3):
            total = total + (pictures.diff(dim=axis) - reference.diff(dim=axis)).abs().mean()
    return total


def add_latent_noise(latents: torch.Tensor, amount: float, draws: torch.Generator) -> torch.Tensor:
    """Latents with noise of a random strength up to `amount`: what a denoiser hands over is never exact."""
    strength = torch.rand(len(latents), 1, 1, 1, generator=draws) * amount
    return latents + strength * torch.randn(latents.shape, generator=draws)


def train_codec(pictures: torch.Tensor, config: AutoencoderConfig, seed: int, progress: Callable[[int, float], None]) -> Codec:
    """A codec trained on pictures [N, 3, H, W] in [-1, 1]; a pure function of its arguments.

    Args:
        pictures: of the training split.
        config: kind, size and steps.
        seed: of initial weights, order and noise.
        progress: called with (step, loss) after each gradient step.
    """
    codec = build_autoencoder(config, seed)
    if isinstance(codec, PatchPCAAutoencoder):
        codec.fit(pictures)
    parameters = [parameter for parameter in codec.parameters() if parameter.requires_grad]
    if parameters and config.steps:
        optimiser = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-3, fused=True)
        for step in range(config.steps):
            warm = min(1.0, (step + 1) / 30)
            rate = config.learning_rate * warm * max(0.02, 0.5 * (1 + math.cos(math.pi * step / config.steps)))
            for group in optimiser.param_groups:
                group["lr"] = rate
            draws = step_generator(seed, "codec", step + 1)
            reference = augment_images(pictures[batch_indices(len(pictures), config.batch_size, seed, step)], VIEWS, draws)
            if isinstance(codec, TinyAutoencoder):
                decoded = codec.net.decoder(add_latent_noise(codec.net.encoder(reference), config.latent_noise, draws))
            else:
                decoded = codec.decode(add_latent_noise(codec.encode(reference), config.latent_noise, draws))
            loss = (decoded - reference).abs().mean() + 0.5 * edge_loss(decoded, reference)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            progress(step + 1, float(loss.detach()))
    if isinstance(codec, TinyAutoencoder):
        codec.fit(pictures)
    return codec.requires_grad_(False).eval()


@torch.inference_mode()
def codec_psnr(codec: Codec, pictures: torch.Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of decoded pictures [N, 3, H, W]; None without any."""
    if not len(pictures):
        return None
    decoded = torch.cat([codec.decode(codec.encode(batch)) for batch in torch.split(pictures, 64)])
    return round(psnr(decoded, pictures), 3)
