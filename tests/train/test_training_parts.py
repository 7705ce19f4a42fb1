"""Schedule, averaged weights, codec training."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from pipeline_steps.diffusion.autoencoder import PatchPCAAutoencoder, psnr
from pipeline_steps.train.autoencoder_training import add_latent_noise, edge_loss, train_codec
from pipeline_steps.train.callbacks import EVERY, EMACallback
from pipeline_steps.train.config import AutoencoderConfig
from pipeline_steps.train.lightning_module import DiffusionModule, build_conditioner, build_denoiser, warmup_cosine
from tests.train.conftest import phases, small_config
from tests.train.test_data import _stream


def test_the_rate_rises_then_falls_to_its_share() -> None:
    shares = [warmup_cosine(step, 100, 10, 0.05) for step in range(101)]
    assert shares[0] == pytest.approx(1 / 11)
    assert max(shares) == shares[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(shares[10:]))
    assert shares[100] == pytest.approx(0.05)
    assert warmup_cosine(-1, 100, 10, 0.05) == 0.0
    assert warmup_cosine(10_000, 100, 10, 0.05) == pytest.approx(0.05)


class _Recorder(Callback):
    """Computes the moving average by hand from the live weights."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if (trainer.global_step - 1) % EVERY:
            return
        for name, value in pl_module.named_parameters():
            live = value.detach().clone()
            old = self.average.get(name, live)
            self.average[name] = self.decay**EVERY * old + (1 - self.decay**EVERY) * live


def test_what_is_left_after_training_is_the_moving_average() -> None:
    config = small_config(
        picture_size=16,
        codec={"channels": 4},
        objective={"coarse_channels": 2},
        conditioner={"frames": 2, "frame_components": 4, "tag_components": 4},
        optimiser={**phases(5, 5), "ema_decay": 0.7},
    )
    torch.manual_seed(0)
    module = DiffusionModule(config, build_denoiser(config, build_conditioner(config)), "digest")
    recorder = _Recorder(0.7)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=10, max_epochs=-1, callbacks=[EMACallback(0.7), recorder], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(_stream(0), batch_size=None))
    for name, value in module.named_parameters():
        assert torch.allclose(value, recorder.average[name], atol=1e-5), name


def test_the_refiner_undoes_noise_that_the_linear_codec_keeps() -> None:
    draws = torch.Generator().manual_seed(0)
    rough = torch.rand(12, 3, 4, 4, generator=draws) * 2 - 1
    pictures = torch.nn.functional.interpolate(rough, size=(32, 32), mode="bicubic").clamp(-1, 1)
    config = AutoencoderConfig(channels=24, width=16, steps=120, batch_size=6, latent_noise=0.4)
    losses: list[float] = []
    codec = train_codec(pictures, config, 0, lambda _step, loss: losses.append(loss))
    assert isinstance(codec, PatchPCAAutoencoder)
    noisy = add_latent_noise(codec.encode(pictures), 0.4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert psnr(codec.decode(noisy), pictures) > psnr(codec.decode_linear(noisy), pictures) + 0.3
    again = train_codec(pictures, config, 0, lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(codec.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_tiny_autoencoder_learns_too() -> None:
    pictures = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 32, 32) * 2 - 1
    losses: list[float] = []
    config = AutoencoderConfig(kind="tiny", channels=4, width=16, steps=40, batch_size=8, latent_noise=0.0)
    train_codec(pictures, config, 0, lambda _step, loss: losses.append(loss))
    assert losses[-1] < 0.65 * losses[0]


def test_edge_loss_sees_a_seam_and_not_a_shade() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    seam = flat.clone()
    seam[..., 8:] = 0.5
    assert float(edge_loss(flat + 0.5, flat)) == 0.0
    assert float(edge_loss(seam, flat)) > 0.01
