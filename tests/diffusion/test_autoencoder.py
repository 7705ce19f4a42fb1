"""Autoencoders: reconstruction, latents of unit size, and a refiner that starts as the identity."""

import pytest
import torch

from pipeline_steps.diffusion.autoencoder import STRIDE, PatchPCAAutoencoder, TinyAutoencoder, psnr


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth colored blobs on white, [24, 3, 32, 32] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(24, 3, 5, 5, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(rough, size=(32, 32), mode="bicubic").clamp(-1, 1)


def test_all_components_are_lossless(images: torch.Tensor) -> None:
    autoencoder = PatchPCAAutoencoder(192, 0.5, 0)
    autoencoder.fit(images)
    assert psnr(autoencoder.decode(autoencoder.encode(images)), images) > 60


def test_more_components_are_better_and_48_are_good(images: torch.Tensor) -> None:
    scores = []
    for channels in (4, 16, 48):
        autoencoder = PatchPCAAutoencoder(channels, 0.5, 0)
        autoencoder.fit(images)
        scores.append(psnr(autoencoder.decode(autoencoder.encode(images)), images))
    assert scores == sorted(scores)
    assert scores[-1] > 35


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_latents_have_unit_mean_square_and_whitening_flattens_them(images: torch.Tensor, whitening: float) -> None:
    autoencoder = PatchPCAAutoencoder(16, whitening, 0)
    autoencoder.fit(images)
    latents = autoencoder.encode(torch.cat([images, images.flip(3)]))
    assert latents.shape == (48, 16, 32 // STRIDE, 32 // STRIDE)
    assert float(latents.square().mean()) == pytest.approx(1.0, rel=1e-3)
    deviations = latents.square().mean((0, 2, 3)).sqrt()
    spread = float(deviations.max() / deviations.min())
    assert spread == pytest.approx(1.0, rel=1e-2) if whitening == 1.0 else spread > 2


def test_the_untrained_refiner_changes_nothing(images: torch.Tensor) -> None:
    autoencoder = PatchPCAAutoencoder(16, 0.5, 8)
    autoencoder.fit(images)
    latents = autoencoder.encode(images)
    assert torch.equal(autoencoder.decode(latents), autoencoder.decode_linear(latents))


def test_fit_does_not_depend_on_the_order_of_images(images: torch.Tensor) -> None:
    first, second = PatchPCAAutoencoder(16, 0.5, 0), PatchPCAAutoencoder(16, 0.5, 0)
    first.fit(images)
    second.fit(images.flip(0))
    assert torch.allclose(first.basis, second.basis, atol=1e-4)


def test_tiny_autoencoder_has_the_same_grid_and_normalized_latents(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    autoencoder = TinyAutoencoder(8, 16)
    autoencoder.fit(images)
    with torch.no_grad():
        latents = autoencoder.encode(images)
        assert latents.shape == (24, 8, 32 // STRIDE, 32 // STRIDE)
        assert float(latents.mean().abs()) < 0.05
        assert float(latents.std()) == pytest.approx(1.0, abs=0.1)
        assert autoencoder.decode(latents).shape == images.shape
