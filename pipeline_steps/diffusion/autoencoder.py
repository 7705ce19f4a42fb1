"""Pictures <-> latents on an 8 times coarser grid. Both codecs are trained (in seconds) on the training pictures alone.

`PatchCodec`: each 8 x 8 patch becomes its principal component scores, which is optimal among linear codes and needs no
gradient step; on the way back a small convolutional refiner, trained with noise on the latents, looks across patch borders.
`TinyCodec`: diffusers' `AutoencoderTiny` (TAESD architecture), trained by gradient descent.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

CodecKind = Literal["patch", "tiny"]
CODEC_VERSION = 1
STRIDE = 8
"""Pixels per latent position, both ways."""


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
    """Correction of a linearly decoded picture [N, 3, H, W]: a two-level convolutional net, zero before training."""

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

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        hidden = self.enter(pictures)
        hidden = hidden + self.up(self.middle(self.down(hidden)))
        correction: torch.Tensor = self.leave(self.fine(hidden))
        return pictures + correction


class PatchPCAAutoencoder(nn.Module):
    """Principal components of 8 x 8 patches, partly whitened, with a learned refiner on the way back.

    Args:
        channels: components kept of 192.
        whitening: exponent p of a component's deviation it is divided by; 0 keeps the spectrum, 1 makes it flat.
        refiner_width: channels of the refiner at half resolution; 0 for none.
    """

    name = "patch"
    family = "patch-pca"
    version = CODEC_VERSION
    mean: torch.Tensor
    basis: torch.Tensor
    scale: torch.Tensor

    def __init__(self, channels: int, whitening: float, refiner_width: int) -> None:
        super().__init__()
        self.settings = {"channels": channels, "whitening": whitening, "refiner_width": refiner_width}
        self.channels = channels
        width = 3 * STRIDE * STRIDE
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("basis", torch.zeros(width, channels))
        self.register_buffer("scale", torch.ones(channels))
        self.refiner: nn.Module = DecoderRefiner(refiner_width) if refiner_width else nn.Identity()

    def describe(self) -> dict[str, Any]:
        """Name, family, version and settings."""
        return {"name": self.name, "family": self.family, "version": self.version, **self.settings}

    @torch.no_grad()
    def fit(self, pictures: torch.Tensor) -> None:
        """Fit the linear part on pictures [N, 3, H, W] and their mirror images; latents get unit mean square."""
        patches = F.pixel_unshuffle(torch.cat([pictures, pictures.flip(3)]), STRIDE).permute(0, 2, 3, 1)
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

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents [N, channels, H / 8, W / 8] of pictures [N, 3, H, W] in [-1, 1]."""
        patches = F.pixel_unshuffle(pictures, STRIDE).permute(0, 2, 3, 1)
        latents: torch.Tensor = (((patches - self.mean) @ self.basis) / self.scale).permute(0, 3, 1, 2)
        return latents

    def decode_linear(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of latents without the refiner: each patch alone."""
        patches = (latents.permute(0, 2, 3, 1) * self.scale) @ self.basis.T + self.mean
        return F.pixel_shuffle(patches.permute(0, 3, 1, 2), STRIDE)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, H, W] of latents [N, channels, H / 8, W / 8]; about [-1, 1], not clamped."""
        pictures: torch.Tensor = self.refiner(self.decode_linear(latents))
        return pictures


class TinyAutoencoder(nn.Module):
    """diffusers' `AutoencoderTiny` at stride 8, its latents brought to zero mean and unit deviation per channel."""

    name = "tiny"
    family = "autoencoder-tiny"
    version = CODEC_VERSION
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        from diffusers import AutoencoderTiny

        self.settings = {"channels": channels, "width": width}
        self.channels = channels
        self.net = AutoencoderTiny(
            latent_channels=channels,
            encoder_block_out_channels=(width,) * 4,
            decoder_block_out_channels=(width,) * 4,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("scale", torch.ones(channels))

    def describe(self) -> dict[str, Any]:
        """Name, family, version and settings."""
        return {"name": self.name, "family": self.family, "version": self.version, **self.settings}

    @torch.no_grad()
    def fit(self, pictures: torch.Tensor) -> None:
        """Measure the latents' mean and deviation over pictures [N, 3, H, W]; to be called after training."""
        latents = torch.cat([self.net.encoder(batch) for batch in torch.split(pictures, 64)])
        self.mean.copy_(latents.mean((0, 2, 3)))
        self.scale.copy_(latents.std((0, 2, 3)) + 1e-6)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents [N, channels, H / 8, W / 8] of pictures [N, 3, H, W] in [-1, 1]."""
        latents: torch.Tensor = (self.net.encoder(pictures) - self.mean[:, None, None]) / self.scale[:, None, None]
        return latents

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures [N, 3, H, W] of latents."""
        pictures: torch.Tensor = self.net.decoder(latents * self.scale[:, None, None] + self.mean[:, None, None])
        return pictures


Codec = PatchPCAAutoencoder | TinyAutoencoder
CODECS: dict[str, type[PatchPCAAutoencoder] | type[TinyAutoencoder]] = {"patch": PatchPCAAutoencoder, "tiny": TinyAutoencoder}


def psnr(pictures: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean peak signal-to-noise ratio in dB of pictures [N, 3, H, W] in [-1, 1] against the reference."""
    error = (pictures.clamp(-1, 1) - reference).square().mean((1, 2, 3)).clamp(min=1e-10)
    return float((10 * torch.log10(4 / error)).mean())
