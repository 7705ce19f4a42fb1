"""Training of the autoencoder: the linear part is fitted in closed form, the rest by gradient steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from pipeline_steps.diffusion.autoencoder import Autoencoder, PatchPCAAutoencoder, TinyAutoencoder, psnr
from pipeline_steps.train.augmentations import augment_images
from pipeline_steps.train.config_groups import ImageAugmentationConfig
from pipeline_steps.train.data import batch_indices, step_generator
from pipeline_steps.train.recipes.scratch.config import AutoencoderConfig

AUGMENTATION = ImageAugmentationConfig(hflip_prob=0.5, max_log_scale=0.12, max_shift=0.06)
"""Augmentation for the autoencoder, independent of the denoiser's: it must reproduce an edge at any position in a patch."""


def build_autoencoder(config: AutoencoderConfig, seed: int) -> Autoencoder:
    """Untrained autoencoder of the configured type.

    It sets torch's random state to a function of the arguments, and training draws nothing from it. Parts that are initialized
    next are therefore equal, whether a run trains its autoencoder or loads it.
    """
    torch.manual_seed(int(step_generator(seed, "codec", 0).initial_seed()))
    if config.type == "tiny":
        return TinyAutoencoder(config.latent_channels, config.hidden_channels)
    hidden_channels = config.hidden_channels if config.max_steps else 0
    return PatchPCAAutoencoder(config.latent_channels, config.whitening, hidden_channels)


def edge_loss(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of finite differences at full and half resolution; sensitive to blur and seams."""
    total = images.new_zeros(())
    for level in range(2):
        if level:
            images, reference = nn.functional.avg_pool2d(images, 2), nn.functional.avg_pool2d(reference, 2)
        for axis in (2, 3):
            total = total + (images.diff(dim=axis) - reference.diff(dim=axis)).abs().mean()
    return total


def add_latent_noise(latents: torch.Tensor, max_std: float, generator: torch.Generator) -> torch.Tensor:
    """Add noise of a random standard deviation up to `max_std`, because latents from a denoiser are never exact."""
    std = torch.rand(len(latents), 1, 1, 1, generator=generator) * max_std
    return latents + std * torch.randn(latents.shape, generator=generator)


def train_autoencoder(
    images: torch.Tensor, config: AutoencoderConfig, seed: int, progress: Callable[[int, float], None]
) -> Autoencoder:
    """Autoencoder trained on images [N, 3, H, W] in [-1, 1]; a pure function of its arguments.

    Args:
        images: of the training split.
        config: type, size and steps.
        seed: of initial weights, order and noise.
        progress: called with (step, loss) after each gradient step.
    """
    autoencoder = build_autoencoder(config, seed)
    if isinstance(autoencoder, PatchPCAAutoencoder):
        autoencoder.fit(images)
    parameters = [parameter for parameter in autoencoder.parameters() if parameter.requires_grad]
    if parameters and config.max_steps:
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=1e-3, fused=True)
        for step in range(config.max_steps):
            warmup = min(1.0, (step + 1) / 30)
            decay = max(0.02, 0.5 * (1 + math.cos(math.pi * step / config.max_steps)))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * warmup * decay
            generator = step_generator(seed, "codec", step + 1)
            rows = batch_indices(len(images), config.batch_size, seed, step)
            reference = augment_images(images[rows], AUGMENTATION, generator)
            if isinstance(autoencoder, TinyAutoencoder):
                latents = add_latent_noise(autoencoder.net.encoder(reference), config.decoder_noise_std, generator)
                decoded = autoencoder.net.decoder(latents)
            else:
                decoded = autoencoder.decode(
                    add_latent_noise(autoencoder.encode(reference), config.decoder_noise_std, generator)
                )
            loss = (decoded - reference).abs().mean() + 0.5 * edge_loss(decoded, reference)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            progress(step + 1, float(loss.detach()))
    if isinstance(autoencoder, TinyAutoencoder):
        autoencoder.fit(images)
    return autoencoder.requires_grad_(False).eval()


@torch.inference_mode()
def autoencoder_psnr(autoencoder: Autoencoder, images: torch.Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of decoded images [N, 3, H, W]; None without images."""
    if not len(images):
        return None
    decoded = torch.cat([autoencoder.decode(autoencoder.encode(batch)) for batch in torch.split(images, 64)])
    return round(psnr(decoded, images), 3)
