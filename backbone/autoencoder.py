"""Stage `autoencoder`: train an `AutoencoderKL` on the images, then encode all of them.

The latent space is regularised by noise: the decoder sees unit-variance latents plus Gaussian noise.
After training, the channels are rotated to their principal components and partially whitened.
Both maps are folded into the last convolution of the encoder and the first one of the decoder.
The result is a stock `AutoencoderKL`.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL

from backbone.checkpoint import generator_of, load_checkpoint, save_checkpoint
from backbone.config import data_folder, params
from backbone.threads import ThreadTuner


def create_autoencoder(settings: dict[str, Any]) -> AutoencoderKL:
    """Return an untrained autoencoder."""
    levels = len(settings["block_out_channels"])
    torch.manual_seed(settings["seed"])
    return AutoencoderKL(
        block_out_channels=tuple(settings["block_out_channels"]),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=settings["latent_channels"],
        layers_per_block=settings["layers_per_block"],
        norm_num_groups=settings["norm_num_groups"],
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=settings["resolution"],
        scaling_factor=1.0,
    )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Return uint8 images [n, h, w, 3] as floats in [-1, 1], [n, 3, h, w]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, gradient_weight: float) -> torch.Tensor:
    """Return L1 + MSE + weighted L1 of the horizontal and vertical differences."""
    difference = output - target
    edges = (difference.diff(dim=2)).abs().mean() + (difference.diff(dim=3)).abs().mean()
    return difference.abs().mean() + difference.square().mean() + gradient_weight * edges


def channel_divergence(mean: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence of each channel's batch statistics from a standard normal distribution, averaged."""
    variance, centre = torch.var_mean(mean, dim=(0, 2, 3))
    return 0.5 * (centre.square() + variance - variance.clamp(min=1e-6).log() - 1).mean()


@torch.no_grad()
def encode_all(model: AutoencoderKL, images: np.ndarray, mirrored: bool, batch_size: int = 64) -> np.ndarray:
    """Return the latent means [n, channels, h, w] as float32."""
    parts = []
    for i in range(0, len(images), batch_size):
        batch = images[i : i + batch_size]
        batch = np.ascontiguousarray(batch[:, :, ::-1]) if mirrored else batch
        parts.append(model.encode(to_tensor(batch)).latent_dist.mode())
    return torch.cat(parts).numpy()


@torch.no_grad()
def psnr(model: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> float:
    """Return the mean over images of the peak signal-to-noise ratio in dB."""
    values = []
    for i in range(0, len(images), batch_size):
        target = to_tensor(images[i : i + batch_size])
        output = model.decode(model.encode(target).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(-10 * torch.log10((output - target).square().mean((1, 2, 3)) / 4))
    return float(torch.cat(values).mean())


@torch.no_grad()
def whiten(model: AutoencoderKL, latents: np.ndarray, exponent: float) -> None:
    """Rotate the latent channels to principal components and scale them, in place, without changing reconstructions.

    Channel i gets the standard deviation sd_i ** (1 - exponent), normalised so that the mean variance is 1.
    """
    flat = torch.from_numpy(latents).movedim(1, -1).reshape(-1, latents.shape[1]).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    order = values.argsort(descending=True)
    deviation, vectors = values[order].clamp(min=1e-8).sqrt(), vectors[:, order]
    target = deviation ** (1 - exponent)
    target = target / target.square().mean().sqrt()
    forward = (vectors * (target / deviation)).T  # [new, old]
    backward = vectors * (deviation / target)  # [old, new]
    channels = latents.shape[1]
    out, enter = model.encoder.conv_out, model.decoder.conv_in
    out.weight[:channels] = torch.einsum("no,oikl->nikl", forward, out.weight[:channels].double()).float()
    out.bias[:channels] = (forward @ out.bias[:channels].double()).float()
    out.weight[channels:] = 0
    out.bias[channels:] = 2 * math.log(0.05)
    enter.weight.copy_(torch.einsum("cokl,on->cnkl", enter.weight.double(), backward).float())


def train(
    model: AutoencoderKL, images: np.ndarray, settings: dict[str, Any], run: Path, decoder_only: bool = False, threads: int = 0
) -> None:
    """Train in place; resumes from the checkpoint of `run` if its settings and images are the same.

    With `decoder_only` the encoder is fixed, so that latents encoded earlier stay valid.
    """
    steps, size = settings["decoder_steps" if decoder_only else "steps"], settings["batch_size"]
    parameters = list((model.decoder if decoder_only else model).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=1e-4, betas=(0.9, 0.98), fused=True)
    path, start = run / "checkpoint.pt", 0
    identity = json.dumps([settings, decoder_only, hashlib.sha256(images.tobytes()).hexdigest()], sort_keys=True)
    state = load_checkpoint(path)
    if state is not None and state.get("identity") == identity:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began, saved = time.monotonic(), time.monotonic()
    noise = settings["decoder_noise"] if decoder_only else settings["latent_noise"]
    tuner = ThreadTuner(threads)
    for step in range(start, steps):
        rng = generator_of(settings["seed"], step, 2 if decoder_only else 1)
        index = torch.randint(0, len(images), (size,), generator=rng).numpy()
        batch = to_tensor(images[index])
        if torch.rand((), generator=rng) < 0.5:
            batch = batch.flip(3)
        progress = step / steps
        factor = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * factor
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not decoder_only):
                mean = model.encode(batch).latent_dist.mode().float()
            noisy = mean + noise * torch.randn(mean.shape, generator=rng)
            output = model.decode(noisy).sample.float()
        loss = reconstruction_loss(output, batch, settings["gradient_weight"])
        if not decoder_only:
            loss = loss + settings["divergence_weight"] * channel_divergence(mean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        tuner.step()
        if (step + 1) % 50 == 0:
            rate = (step + 1 - start) * size / (time.monotonic() - began)
            print(f"step {step + 1}/{steps} loss {loss.item():.4f} {rate:.1f} samples/s", flush=True)
        if time.monotonic() - saved > settings["checkpoint_seconds"] or step + 1 == steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "identity": identity}
            save_checkpoint(path, state)
            saved = time.monotonic()


def main() -> None:
    """Train the autoencoder, or only its decoder, and write the latents of all images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 tunes them")
    parser.add_argument("--decoder-only", action="store_true", help="continue with the decoder; the latents stay valid")
    parser.add_argument("--init-from", type=Path, help="diffusers folder whose autoencoder encodes the images; no training")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    settings = {**params("autoencoder"), "resolution": params("dataset")["resolution"]}
    dataset, output = data_folder() / "dataset", data_folder() / ("decoder" if arguments.decoder_only else "autoencoder")
    images = np.load(dataset / "images.npy", mmap_mode="r")
    split = np.array(pq.read_table(dataset / "items.parquet", columns=["split"])["split"].to_pylist())
    training, held_out = np.asarray(images[split == "train"]), np.asarray(images[split == "validation"])
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    if arguments.decoder_only:
        model = AutoencoderKL.from_pretrained(data_folder() / "autoencoder" / "vae")
        report["psnr_validation_before"] = psnr(model, held_out)
        train(model, training, settings, output, decoder_only=True, threads=arguments.threads)
    else:
        if arguments.init_from is not None:
            model = AutoencoderKL.from_pretrained(arguments.init_from, subfolder="vae", torch_dtype=torch.float32).eval()
        else:
            model = create_autoencoder(settings)
            train(model, training, settings, output, threads=arguments.threads)
            model.eval()
            whiten(model, encode_all(model, training, mirrored=False), settings["whitening"])
        latents = np.stack([encode_all(model, images, mirrored=mirrored) for mirrored in (False, True)], axis=1)
        np.save(output / "latents.npy", latents)
        scenes = np.load(dataset / "scenes.npy", mmap_mode="r")
        scene_latents = np.stack([encode_all(model, scenes, mirrored=mirrored) for mirrored in (False, True)], axis=1)
        np.save(output / "scene_latents.npy", scene_latents)
        report["latent_standard_deviation"] = [round(float(value), 3) for value in latents.std(axis=(0, 1, 3, 4))]
    model.eval()
    report |= {"psnr_validation": psnr(model, held_out), "psnr_train": psnr(model, training[:256])}
    model.save_pretrained(output / "vae", safe_serialization=True)
    (output / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
