"""Learning rate schedule, averaged weights, autoencoder training."""

from __future__ import annotations

import itertools

import lightning.pytorch as pl
import pytest
import torch

from pipeline_steps.diffusion.autoencoder import PatchPCAAutoencoder, psnr
from pipeline_steps.train.callbacks import EMACallback
from pipeline_steps.train.lightning_module import warmup_cosine
from pipeline_steps.train.recipes.scratch.autoencoder_training import add_latent_noise, edge_loss, train_autoencoder
from pipeline_steps.train.recipes.scratch.config import AutoencoderConfig
from tests.train.small_run import EMARecorder, scratch_datamodule, tiny_module


def test_the_learning_rate_rises_then_falls_to_its_ratio() -> None:
    rates = [warmup_cosine(step, 0, 100, 10, 0.05) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.05)
    assert warmup_cosine(-1, 0, 100, 10, 0.05) == 0.0
    assert warmup_cosine(10_000, 0, 100, 10, 0.05) == pytest.approx(0.05)
    assert warmup_cosine(7, 7, 100, 10, 0.05) == rates[0]


def test_what_is_left_after_training_is_the_moving_average() -> None:
    module = tiny_module()
    recorder = EMARecorder(0.7)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=10, max_epochs=-1, callbacks=[EMACallback(0.7), recorder], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=scratch_datamodule())
    for name, value in module.named_parameters():
        assert torch.allclose(value, recorder.average[name], atol=1e-5), name


def test_the_refiner_removes_noise_that_the_linear_decoder_keeps() -> None:
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(12, 3, 4, 4, generator=generator) * 2 - 1
    images = torch.nn.functional.interpolate(rough, size=(32, 32), mode="bicubic").clamp(-1, 1)
    config = AutoencoderConfig(latent_channels=24, hidden_channels=16, max_steps=120, batch_size=6, decoder_noise_std=0.4)
    losses: list[float] = []
    autoencoder = train_autoencoder(images, config, 0, lambda _step, loss: losses.append(loss))
    assert isinstance(autoencoder, PatchPCAAutoencoder)
    noisy = add_latent_noise(autoencoder.encode(images), 0.4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert psnr(autoencoder.decode(noisy), images) > psnr(autoencoder.decode_linear(noisy), images) + 0.3
    again = train_autoencoder(images, config, 0, lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(autoencoder.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_tiny_autoencoder_learns_too() -> None:
    images = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 32, 32) * 2 - 1
    losses: list[float] = []
    config = AutoencoderConfig(
        type="tiny", latent_channels=4, hidden_channels=16, max_steps=40, batch_size=8, decoder_noise_std=0.0
    )
    train_autoencoder(images, config, 0, lambda _step, loss: losses.append(loss))
    assert losses[-1] < 0.65 * losses[0]


def test_edge_loss_responds_to_a_seam_and_not_to_a_shade() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    seam = flat.clone()
    seam[..., 8:] = 0.5
    assert float(edge_loss(flat + 0.5, flat)) == 0.0
    assert float(edge_loss(seam, flat)) > 0.01
