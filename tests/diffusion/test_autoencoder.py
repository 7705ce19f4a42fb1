"""Codecs: what goes in comes out, latents are of unit size, and the refiner starts as nothing."""

import pytest
import torch

from pipeline_steps.diffusion.autoencoder import STRIDE, PatchPCAAutoencoder, TinyAutoencoder, psnr


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Smooth coloured blobs on white, [24, 3, 32, 32] in [-1, 1]."""
    draws = torch.Generator().manual_seed(0)
    rough = torch.rand(24, 3, 5, 5, generator=draws) * 2 - 1
    return torch.nn.functional.interpolate(rough, size=(32, 32), mode="bicubic").clamp(-1, 1)


def test_all_components_are_lossless(pictures: torch.Tensor) -> None:
    codec = PatchPCAAutoencoder(192, 0.5, 0)
    codec.fit(pictures)
    assert psnr(codec.decode(codec.encode(pictures)), pictures) > 60


def test_more_components_are_better_and_48_are_good(pictures: torch.Tensor) -> None:
    scores = []
    for channels in (4, 16, 48):
        codec = PatchPCAAutoencoder(channels, 0.5, 0)
        codec.fit(pictures)
        scores.append(psnr(codec.decode(codec.encode(pictures)), pictures))
    assert scores == sorted(scores)
    assert scores[-1] > 35


@pytest.mark.parametrize("whitening", [0.0, 0.5, 1.0])
def test_latents_have_unit_mean_square_and_whitening_flattens_them(pictures: torch.Tensor, whitening: float) -> None:
    codec = PatchPCAAutoencoder(16, whitening, 0)
    codec.fit(pictures)
    latents = codec.encode(torch.cat([pictures, pictures.flip(3)]))
    assert latents.shape == (48, 16, 32 // STRIDE, 32 // STRIDE)
    assert float(latents.square().mean()) == pytest.approx(1.0, rel=1e-3)
    deviations = latents.square().mean((0, 2, 3)).sqrt()
    spread = float(deviations.max() / deviations.min())
    assert spread == pytest.approx(1.0, rel=1e-2) if whitening == 1.0 else spread > 2


def test_the_untrained_refiner_changes_nothing(pictures: torch.Tensor) -> None:
    codec = PatchPCAAutoencoder(16, 0.5, 8)
    codec.fit(pictures)
    latents = codec.encode(pictures)
    assert torch.equal(codec.decode(latents), codec.decode_linear(latents))


def test_fit_does_not_depend_on_the_order_of_pictures(pictures: torch.Tensor) -> None:
    first, second = PatchPCAAutoencoder(16, 0.5, 0), PatchPCAAutoencoder(16, 0.5, 0)
    first.fit(pictures)
    second.fit(pictures.flip(0))
    assert torch.allclose(first.basis, second.basis, atol=1e-4)


def test_tiny_codec_has_the_same_grid_and_normalised_latents(pictures: torch.Tensor) -> None:
    torch.manual_seed(0)
    codec = TinyAutoencoder(8, 16)
    codec.fit(pictures)
    with torch.no_grad():
        latents = codec.encode(pictures)
        assert latents.shape == (24, 8, 32 // STRIDE, 32 // STRIDE)
        assert float(latents.mean().abs()) < 0.05
        assert float(latents.std()) == pytest.approx(1.0, abs=0.1)
        assert codec.decode(latents).shape == pictures.shape
