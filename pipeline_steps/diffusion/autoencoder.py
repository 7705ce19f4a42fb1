"""Autoencoders of recipe `scratch`: images <-> latents on an 8 times coarser grid, trained on the training images alone.

`PatchPCAAutoencoder`: principal component scores of 8 x 8 patches, the optimal linear code, which needs no gradient step. A
small convolutional refiner, trained with noisy latents, corrects the decoded image across patch borders.
`TinyAutoencoder`: diffusers' `AutoencoderTiny` (TAESD architecture), trained by gradient descent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

AUTOENCODER_VERSION = 1
STRIDE = 8
"""Pixels per latent position in both directions."""


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.second(F.silu(self.first(F.silu(self.norm(hidden)))))
        return hidden + update


class DecoderRefiner(nn.Module):
    """Two-level convolutional correction of a linearly decoded image [N, 3, H, W]; the identity at initialization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1))
        self.down = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, 2 * width, 1))
        self.middle = nn.Sequential(ResidualBlock(2 * width), ResidualBlock(2 * width))
        self.up = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 1), nn.PixelShuffle(2))
        self.fine = ResidualBlock(width)
        self.leave = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))
        last = self.leave[0]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.enter(images)
        hidden = hidden + self.up(self.middle(self.down(hidden)))
        correction: torch.Tensor = self.leave(self.fine(hidden))
        return images + correction


class PatchPCAAutoencoder(nn.Module):
    """Partly whitened principal components of 8 x 8 patches, with a learned refiner after decoding.

    Args:
        channels: components kept of 192.
        whitening: exponent of the deviation that a component is divided by; 0 keeps the spectrum, 1 flattens it.
        hidden_channels: channels of the refiner at half resolution; 0 disables it.
    """

    name = "patch_pca"
    version = AUTOENCODER_VERSION
    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    def __init__(self, channels: int, whitening: float, hidden_channels: int) -> None:
        super().__init__()
        self.settings = {"channels": channels, "whitening": whitening, "hidden_channels": hidden_channels}
        self.channels = channels
        width = 3 * STRIDE * STRIDE
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(width, channels))
        self.register_buffer("scale", torch.ones(channels))
        self.refiner: nn.Module = DecoderRefiner(hidden_channels) if hidden_channels else nn.Identity()

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> None:
        """Fit the linear part on images [N, 3, H, W] and their mirror images; latents get unit mean square."""
        patches = F.pixel_unshuffle(torch.cat([images, images.flip(3)]), STRIDE).permute(0, 2, 3, 1)
        rows = patches.reshape(-1, self.mean.numel()).double()
        mean = rows.mean(0)
        values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        vectors = vectors.flip(1)[:, : self.channels]
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        deviations = values.flip(0)[: self.channels].clamp(min=1e-10).sqrt()
        scale = deviations ** float(self.settings["whitening"])
        self.mean.copy_(mean)
        self.basis.copy_(vectors * signs)
        self.scale.copy_(scale * ((deviations / scale) ** 2).mean().sqrt())

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [N, channels, H / 8, W / 8] of images [N, 3, H, W] in [-1, 1]."""
        patches = F.pixel_unshuffle(images, STRIDE).permute(0, 2, 3, 1)
        latents: torch.Tensor = (((patches - self.mean) @ self.basis) / self.scale).permute(0, 3, 1, 2)
        return latents

    def decode_linear(self, latents: torch.Tensor) -> torch.Tensor:
        """Images of latents without the refiner; each patch is decoded independently."""
        patches = (latents.permute(0, 2, 3, 1) * self.scale) @ self.basis.T + self.mean
        return F.pixel_shuffle(patches.permute(0, 3, 1, 2), STRIDE)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] of latents [N, channels, H / 8, W / 8]; about [-1, 1], not clamped."""
        images: torch.Tensor = self.refiner(self.decode_linear(latents))
        return images


class TinyAutoencoder(nn.Module):
    """diffusers' `AutoencoderTiny` at stride 8 with latents normalized to zero mean and unit deviation per channel."""

    name = "tiny"
    version = AUTOENCODER_VERSION
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        from diffusers import AutoencoderTiny

        self.settings = {"channels": channels, "hidden_channels": hidden_channels}
        self.channels = channels
        self.net = AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(hidden_channels,) * 4,
            decoder_block_out_channels=(hidden_channels,) * 4,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    @torch.no_grad()
    def fit(self, images: torch.Tensor) -> None:
        """Measure mean and deviation of the latents of images [N, 3, H, W]; call it after training."""
        latents = torch.cat([self.net.encoder(batch) for batch in torch.split(images, 64)])
        self.mean.copy_(latents.mean((0, 2, 3)))
        self.scale.copy_(latents.std((0, 2, 3)) + 1e-6)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents [N, channels, H / 8, W / 8] of images [N, 3, H, W] in [-1, 1]."""
        latents: torch.Tensor = (self.net.encoder(images) - self.mean[:, None, None]) / self.scale[:, None, None]
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W] of latents."""
        images: torch.Tensor = self.net.decoder(latents * self.scale[:, None, None] + self.mean[:, None, None])
        return images


Autoencoder = PatchPCAAutoencoder | TinyAutoencoder
AUTOENCODERS: dict[str, type[PatchPCAAutoencoder] | type[TinyAutoencoder]] = {
    kind.name: kind for kind in (PatchPCAAutoencoder, TinyAutoencoder)
}


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of images [N, 3, H, W] in [-1, 1] against the reference."""
    error = (images.clamp(-1, 1) - reference).square().mean((1, 2, 3)).clamp(min=1e-10)
    return float((10 * torch.log10(4 / error)).mean())
