"""Stage `train`: train the text-to-image UNet on latents and token states. Ends only at `--until` or a signal.

Batch k depends on nothing but the seed and k. A checkpoint holds the weights, their averages, the optimizer and k.
A killed run therefore resumes with the same batches. With a fixed number of threads the weights are equal bit by bit.
"""

import argparse
import fcntl
import hashlib
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw

from backbone.checkpoint import generator_of, load_checkpoint, save_checkpoint
from backbone.config import data_folder, params, vae_folder
from backbone.model import PooledTextOverride, create_scheduler, create_unet, decode, sample_latents
from backbone.text import TextEncoder
from backbone.threads import ThreadTuner

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class TrainingData:
    """Latents, token states and the captions of each image.

    Attributes:
        latents: memory-mapped, [images, 2, channels, size, size]; the second axis is the mirror image.
        scene_latents: memory-mapped, [scenes, 2, channels, size, size].
        scenes: [scenes, 2] rows of the images in each scene; the second is -1 for a scene of one thing.
        scene_weights: [scenes] weight of the first one in the blend of token states.
        states: memory-mapped float16 token states [captions, tokens, width]; row 0 is the empty caption.
        captions: caption rows of each image.
        weights: sampling weight of each image; zero outside the training split.
        validation: rows of the validation images.
    """

    latents: np.ndarray
    scene_latents: np.ndarray
    scenes: np.ndarray
    scene_weights: np.ndarray
    states: np.ndarray
    captions: list[np.ndarray]
    weights: torch.Tensor
    validation: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "TrainingData":
        """Load what the stages `dataset` and `autoencoder` wrote."""
        items = pq.read_table(folder / "dataset" / "items.parquet").to_pylist()
        scenes = pq.read_table(folder / "dataset" / "scenes.parquet")
        return cls(
            latents=np.load(folder / "autoencoder" / "latents.npy", mmap_mode="r"),
            scene_latents=np.load(folder / "autoencoder" / "scene_latents.npy", mmap_mode="r"),
            scenes=np.stack([scenes["first"].to_numpy(), scenes["second"].to_numpy()], axis=1),
            scene_weights=scenes["weight"].to_numpy(),
            states=np.load(folder / "dataset" / "token_states.npy", mmap_mode="r"),
            captions=[np.array(item["captions"]) for item in items],
            weights=torch.tensor([item["sampling_weight"] for item in items], dtype=torch.float64),
            validation=np.flatnonzero([item["sounds"] and item["split"] == "validation" for item in items]),
        )

    def fingerprint(self) -> str:
        """Return a hash of the latents, captions and weights."""
        digest = hashlib.sha256()
        parts = (self.latents[::17], self.scene_latents[::17], self.states[::101], self.weights.numpy(), *self.captions)
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:16]


@dataclass
class Batch:
    """One batch on the CPU."""

    images: np.ndarray
    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    states: torch.Tensor
    pooled_states: torch.Tensor


def sample_times(size: int, settings: dict[str, Any], rng: torch.Generator) -> torch.Tensor:
    """Return integer timesteps [size]: stratified logit-normal, with a fraction of uniform ones."""
    strata = (torch.randperm(size, generator=rng) + torch.rand(size, generator=rng)) / size
    normal = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4).double()).float()
    times = torch.sigmoid(settings["time_mean"] + settings["time_deviation"] * normal)
    uniform = torch.rand(size, generator=rng)
    times = torch.where(torch.rand(size, generator=rng) < settings["time_uniform"], uniform, times)
    return (times * 1000).long().clamp(0, 999)


def make_batch(data: TrainingData, step: int, settings: dict[str, Any]) -> Batch:
    """Return batch `step`; a pure function of the data, the settings and the step.

    The first samples are single images, the others scenes. A single image is a scene whose first weight is 1.
    """
    size, rng = settings["batch_size"], generator_of(settings["seed"], step)
    single = size - round(size * settings["scene_fraction"])
    images = torch.multinomial(data.weights, single, replacement=True, generator=rng).numpy()
    scenes = torch.randint(0, len(data.scenes), (size - single,), generator=rng).numpy()
    mirrored = torch.randint(0, 2, (size,), generator=rng).numpy()
    first = np.concatenate([images, data.scenes[scenes, 0]])
    second = np.concatenate([np.full(single, -1), data.scenes[scenes, 1]])
    weight = torch.from_numpy(np.concatenate([np.ones(single), data.scene_weights[scenes]]).astype(np.float32))[:, None, None]

    def caption_rows(shown: np.ndarray) -> np.ndarray:
        choice = torch.rand(size, generator=rng).numpy()
        return np.array(
            [0 if i < 0 else data.captions[i][int(c * len(data.captions[i]))] for i, c in zip(shown, choice, strict=True)]
        )

    rows = np.stack([caption_rows(first), caption_rows(second)])
    rows[:, (torch.rand(size, generator=rng) < settings["condition_dropout"]).numpy()] = 0
    pooled_rows = np.where((torch.rand(size, generator=rng) < settings["pooled_dropout"]).numpy(), 0, rows)
    latents = torch.from_numpy(
        np.concatenate([data.latents[images, mirrored[:single]], data.scene_latents[scenes, mirrored[single:]]])
    )
    jitter = settings["text_noise"] * torch.randn((size, *data.states.shape[1:]), generator=rng)

    def blend(caption: np.ndarray) -> torch.Tensor:
        one, other = (torch.from_numpy(data.states[part].astype(np.float32)) for part in caption)
        states: torch.Tensor = weight * one + (1 - weight) * other + jitter * torch.from_numpy(caption[0] > 0)[:, None, None]
        return states

    return Batch(
        images=first,
        latents=latents,
        noise=torch.randn(latents.shape, generator=rng),
        timesteps=sample_times(size, settings, rng),
        states=blend(rows),
        pooled_states=blend(pooled_rows),
    )


def ema_exponent(relative_std: float) -> float:
    """Return the exponent gamma of the power-function EMA with this relative standard deviation (EDM2)."""
    roots = np.roots([1.0, 7.0, 16 - relative_std**-2, 12 - relative_std**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


class Trainer:
    """Optimizer, averages and the training step."""

    def __init__(self, unet: UNet2DConditionModel, settings: dict[str, Any], device: torch.device) -> None:
        self.unet = unet.to(device)
        self.settings, self.device, self.step, self.samples = settings, device, 0, 0
        if device.type == "cpu":  # the fused kernel is slower for so few tokens
            unet.set_attn_processor(AttnProcessor())
        self.override = PooledTextOverride(unet)
        self.optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=settings["lr"],
            betas=tuple(settings["adam_betas"]),
            weight_decay=settings["weight_decay"],
            fused=True,
        )
        self.parameters = list(unet.parameters())
        self.averages = [[p.detach().clone() for p in self.parameters] for _ in settings["ema_relative_std"]]
        self.exponents = [ema_exponent(s) for s in settings["ema_relative_std"]]
        alphas = create_scheduler().alphas_cumprod
        self.alpha, self.sigma = alphas.sqrt().to(device), (1 - alphas).sqrt().to(device)

    def learning_rate(self) -> float:
        """Return the learning rate of the current step."""
        s = self.settings
        factor = min(1.0, (self.step + 1) / s["warmup_steps"])
        if s["total_steps"]:
            factor *= min(1.0, max(0.0, (s["total_steps"] - self.step) / (s["cooldown_fraction"] * s["total_steps"])))
        return float(s["lr"] * factor)

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return the mean squared error of the predicted velocity of each sample, [batch]."""
        latents, noise, times, states, pooled = (
            part.to(self.device, non_blocking=True)
            for part in (batch.latents, batch.noise, batch.timesteps, batch.states, batch.pooled_states)
        )
        alpha, sigma = self.alpha[times][:, None, None, None], self.sigma[times][:, None, None, None]
        self.override.states = pooled
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.unet(alpha * latents + sigma * noise, times, states).sample
        self.override.states = None
        error: torch.Tensor = output.float() - (alpha * noise - sigma * latents)
        return error.square().mean((1, 2, 3))

    def train_step(self, batch: Batch) -> float:
        """Make one optimizer step and return the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.losses(batch).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings["max_grad_norm"])
        self.optimizer.step()
        self.step += 1
        self.samples += len(batch.images)
        if self.step % self.settings["ema_every"] == 0:
            k = self.step / self.settings["ema_every"]
            with torch.no_grad():
                for average, gamma in zip(self.averages, self.exponents, strict=True):
                    torch._foreach_lerp_(average, self.parameters, 1 - (1 - 1 / k) ** (gamma + 1))
        return float(loss.detach())

    @torch.no_grad()
    def validation_loss(self, data: TrainingData, repeats: int = 4) -> float:
        """Return the loss on validation images with fixed noise and times."""
        total = []
        for repeat in range(repeats):
            rng = generator_of(self.settings["seed"], repeat, stream=9)
            rows = data.validation
            captions = np.array([data.captions[i][0] for i in rows])
            states = torch.from_numpy(data.states[captions].astype(np.float32))
            latents = torch.from_numpy(np.ascontiguousarray(data.latents[rows, 0]))
            noise = torch.randn(latents.shape, generator=rng)
            times = sample_times(len(rows), self.settings, rng)
            total.append(self.losses(Batch(rows, latents, noise, times, states, states)).mean())
        return float(torch.stack(total).mean())

    def swap(self, average: int) -> None:
        """Exchange the weights and one of their averages in place; a second call restores them."""
        for parameter, mean in zip(self.parameters, self.averages[average], strict=True):
            parameter.data, mean.data = mean.data, parameter.data

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        return {
            "unet": self.unet.state_dict(),
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "samples": self.samples,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.unet.load_state_dict(state["unet"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            for mean, value in zip(average, saved, strict=True):
                mean.copy_(value)
        self.step, self.samples = state["step"], state["samples"]


def sample_grid(
    trainer: Trainer,
    vae: AutoencoderKL,
    states: torch.Tensor,
    empty: torch.Tensor,
    prompts: list[str],
    path: Path,
    seeds: int = 3,
) -> None:
    """Write a grid PNG: `seeds` samples of each prompt by the longest average."""
    settings, device = trainer.settings, trainer.device
    trainer.swap(-1)
    with torch.autocast(device.type, torch.bfloat16):
        latents = sample_latents(
            trainer.unet,
            states.repeat_interleave(seeds, 0).to(device),
            empty.to(device),
            [n for _ in prompts for n in range(seeds)],
            settings["guidance_scale"],
            settings["num_inference_steps"],
        )
    trainer.swap(-1)
    images = decode(vae.to(device), latents.float()).numpy()
    write_sheet(images.reshape(len(prompts), seeds, *images.shape[1:]), prompts, path)


def write_sheet(images: np.ndarray, labels: list[str], path: Path, columns: int = 5) -> None:
    """Write images [prompts, seeds, height, width, 3] as a labelled sheet; the file appears complete or not at all."""
    prompts, seeds, height, width, _ = images.shape
    cell_width, cell_height = seeds * (width + 2) + 8, height + 16
    sheet = Image.new("RGB", (columns * cell_width, -(-prompts // columns) * cell_height), "white")
    drawing = ImageDraw.Draw(sheet)
    for n in range(prompts):
        left, top = n % columns * cell_width, n // columns * cell_height
        drawing.text((left + 2, top), labels[n][:36], fill=0)
        for s in range(seeds):
            sheet.paste(Image.fromarray(images[n, s]), (left + s * (width + 2), top + 13))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    sheet.save(temporary, "PNG")
    temporary.replace(path)


def published_unet(folder: Path, expected: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return the UNet of a diffusers folder in float32.

    Raises:
        ValueError: it has another architecture than the expected one.
    """
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    found, own = ({name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (unet, expected))
    for name in sorted(found.keys() | own.keys()):
        if found.get(name) != own.get(name):
            raise ValueError(f"{folder}/unet: shape of {name} is {found.get(name)}; params.yaml (unet) needs {own.get(name)}")
    return unet


def run(folder: Path, output: Path, arguments: argparse.Namespace) -> None:
    """Train until `arguments.until` steps or a signal."""
    settings = params("train", arguments.params)
    if arguments.batch_size:
        settings["batch_size"] = arguments.batch_size
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_flush_denormal(True)
    data = TrainingData.load(folder)
    architecture = params("unet", arguments.params)
    unet = create_unet(architecture, data.latents.shape[2], data.latents.shape[-1], settings["seed"])
    if arguments.init_from is not None:
        unet.load_state_dict(published_unet(arguments.init_from, unet).state_dict())
    trainer = Trainer(unet, settings, device)
    identity = {"data": data.fingerprint(), "unet": json.dumps(architecture, sort_keys=True), "seed": settings["seed"]}
    checkpoint = output / "checkpoint.pt"
    if (state := load_checkpoint(checkpoint, "cpu")) is not None:
        if state["identity"] != identity:
            raise ValueError(f"{checkpoint}: belongs to other data, another UNet or another seed; use another --run folder")
        trainer.load(state)
        del state
    vae = AutoencoderKL.from_pretrained(vae_folder()).eval()
    encoder = TextEncoder(folder / "dataset" / "text")
    prompts = list(settings["grid_prompts"])
    encoded = torch.from_numpy(encoder.token_states(["", *prompts])).float()
    del encoder

    stop: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda received, _frame: stop.append(received))

    def save() -> None:
        save_checkpoint(checkpoint, {**trainer.state(), "identity": identity})

    print(f"{sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters, {device}, from step {trainer.step}", flush=True)
    log = (output / "log.jsonl").open("a", encoding="utf-8")
    tuner = ThreadTuner(0 if arguments.threads is None else arguments.threads) if device.type == "cpu" else None
    saved = gridded = time.monotonic()
    began, began_at, losses = time.monotonic(), trainer.samples, []
    while not stop and (not arguments.until or trainer.step < arguments.until):
        losses.append(trainer.train_step(make_batch(data, trainer.step, settings)))
        if tuner is not None:
            tuner.step()
        now = time.monotonic()
        if trainer.step % 100 == 0:
            row = {
                "step": trainer.step,
                "samples": trainer.samples,
                "loss": round(float(np.mean(losses)), 5),
                "samples_per_second": round((trainer.samples - began_at) / (now - began), 1),
                "threads": torch.get_num_threads(),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            began, began_at, losses = now, trainer.samples, []
            if trainer.step % settings["validation_every"] == 0:
                trainer.swap(-1)
                row["validation_loss"] = round(trainer.validation_loss(data), 5)
                trainer.swap(-1)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(json.dumps(row), flush=True)
        if now - saved > settings["checkpoint_seconds"]:
            save()
            saved = time.monotonic()
        if now - gridded > settings["grid_seconds"]:
            sample_grid(trainer, vae, encoded[1:], encoded[:1], prompts, output / "grids" / f"{trainer.samples:09d}.png")
            gridded = time.monotonic()
    save()
    print(f"stopped at step {trainer.step}, checkpoint written", flush=True)


def main() -> None:
    """Train; one process per run folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="run", help="folder of checkpoints, log and grids, below the data folder")
    parser.add_argument("--params", type=Path, help="another params.yaml")
    parser.add_argument("--init-from", type=Path, help="diffusers folder whose UNet a new run starts from")
    parser.add_argument("--until", type=int, default=0, help="stop after this many steps; 0: never")
    parser.add_argument("--threads", type=int, help="torch threads; default: tuned while running")
    parser.add_argument("--batch-size", type=int, help="overrides train.batch_size, for a GPU")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    arguments = parser.parse_args()
    output = data_folder() / arguments.run
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"{output}: another process trains here")
        run(data_folder(), output, arguments)


if __name__ == "__main__":
    main()
