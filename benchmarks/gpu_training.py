"""Training on one accelerator: images/s, MFU, peak memory and waiting time, compared with a diffusers loop.

Usage: python -m benchmarks.gpu_training [--steps 20] [--rounds 3] [--reduced] [--json FILE]

The model is recipe `ip_adapter` on Stable Diffusion 1.5's U-Net (860 M weights) and autoencoder, 512 px: the resampler of AST
tokens and the keys and values for 32 audio tokens are trained, the rest is frozen. Weights are random: speed does not depend on
them.

Sides: `plain` is the loop of diffusers' examples: fp32, AdamW, images encoded in every step, data made in the same thread, no
fusion, no compilation. `ours` is what `train` does on a GPU: bf16 autocast, cached latents, channels-last, SDPA, fused AdamW,
torch.compile, a DataLoader with worker processes and pinned memory; `ours, eager` is not compiled. Both train the same modules.
Rounds are interleaved; images/s is that of the best round, beside the median.

MFU: floating-point operations of one forward and backward pass, counted by torch's FlopCounterMode on that very model (multiply
and add are two; frozen weights' gradients are not computed and not counted; encoding images is not counted), times steps/s,
over the card's published dense bf16 peak. Peak memory is that of the side itself: weights, optimizer, activations.
Waiting: fraction of the time in which the device had no work because of data.
Without a GPU the models are narrow and the numbers only test the script; the output says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps.train.compilation import inductor_or_eager
from pipeline_steps.train.config_groups import OptimizerConfig, PhaseConfig
from pipeline_steps.train.data import TrainingBatch
from pipeline_steps.train.lightning_module import DiffusionModule

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GB200": 2500.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bf16 tensor-core TFLOP/s from the makers' data sheets (SXM unless stated); the longest fitting name counts."""
REDUCED = "reduced, CPU: not comparable with a GPU"


def peak_tflops(name: str) -> float | None:
    """Published peak of a card by its CUDA name; None if it is not in the table."""
    fitting = [key for key in PEAK_TFLOPS if all(re.search(rf"\b{word}\b", name) for word in key.split())]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


SETTINGS: dict[str, Any] = {
    "digest": "benchmark",
    "phase": PhaseConfig(max_steps=20_000, batch_size=16, learning_rate=1e-4),
    "optimizer": OptimizerConfig(),
    "seed": 0,
    "max_nonfinite_steps": 3,
}


@dataclass
class Task:
    """A model to be trained, as in the project.

    Attributes:
        training: the product's module.
        encode: images -> latents, by the frozen autoencoder.
        images: one batch [N, 3, H, W] on the CPU.
        batch: the rest of it; its latents are replaced.
        frozen: other networks on the device.
    """

    training: DiffusionModule
    encode: Callable[[torch.Tensor], torch.Tensor]
    images: torch.Tensor
    batch: TrainingBatch
    frozen: list[nn.Module]

    def loss(self, batch: TrainingBatch) -> torch.Tensor:
        """Mean over a batch that lies on the device."""
        return self.training.per_sample_loss(batch).mean()


def sd15(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Task:
    """Recipe `ip_adapter` on Stable Diffusion 1.5's shape; `--reduced` narrows it. Audio is AST tokens of ten seconds."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    from pipeline_steps.diffusion.audio_prompt import AudioPrompt
    from pipeline_steps.diffusion.audio_tokens import TAGS, AudioTokens
    from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
    from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
    from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
    from pipeline_steps.train.recipes.ip_adapter.lightning_module import AudioIPAdapterModule

    narrow = arguments.reduced
    width, length, bands = (64, 8, 2) if narrow else (768, 101, 12)
    size, count = (64, 2) if narrow else (512, arguments.batch)
    backbone = StableDiffusionBackbone("random weights", dtype=dtype)
    with torch.device(device):
        backbone.unet = UNet2DConditionModel(
            sample_size=size // 8,
            block_out_channels=(32, 64, 64, 64) if narrow else (320, 640, 1280, 1280),
            cross_attention_dim=width,
            attention_head_dim=8,
        )
        backbone.vae = AutoencoderKL(
            block_out_channels=(32, 32, 32, 32) if narrow else (128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=size,
            scaling_factor=0.18215,
        )
    backbone.unet.requires_grad_(False).to(dtype)
    backbone.vae.requires_grad_(False).eval()
    backbone.device = device
    backbone.noise_scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    shape = {"dim": 32, "depth": 1, "heads": 2} if narrow else {"dim": 512, "depth": 4, "heads": 8}
    adapter = AudioIPAdapter(backbone, PerceiverResampler(width, bands, 32, output_width=width, **shape), AudioPrompt(""))
    generator = torch.Generator().manual_seed(0)
    adapter._prompt_embeds[""] = torch.randn(1, 77, width, generator=generator)  # there is no text encoder here
    training = AudioIPAdapterModule(adapter, 5.0, **SETTINGS).to(device)
    images = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    grids = [torch.randn(length, bands, width, generator=generator).half() for _ in range(count)]
    audio = adapter.collate([AudioTokens(grid, torch.zeros(TAGS), -20.0) for grid in grids])

    def encode(given: torch.Tensor) -> torch.Tensor:
        mean, std = backbone.encode(given)
        return backbone.sample_latents(mean, std, torch.randn_like(mean))

    batch = batch_of((count, 4, size // 8, size // 8), audio, generator)
    return Task(training, encode, images, batch, [backbone.unet, backbone.vae])


def batch_of(shape: tuple[int, ...], audio: Any, generator: torch.Generator) -> TrainingBatch:
    """Batch of a step with the given audio; latents [N, C, h, w] of `shape` are zero."""
    count = shape[0]
    return TrainingBatch(
        latents=torch.zeros(shape),
        noise=torch.randn(shape, generator=generator),
        times=torch.rand(count, generator=generator),
        condition_mask=torch.rand(count, generator=generator) > 0.15,
        audio=audio,
        rows=list(range(count)),
        total=count,
    )


class Side:
    """One way to train a task: `run(n)` makes n steps."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.device = device
        self.learning = [value for value in task.training.parameters() if value.requires_grad]
        self.note = ""
        self.optimizer: torch.optim.Optimizer
        self.source: TimedBatches

    def run(self, steps: int) -> None:
        """Run so many steps."""
        raise TypeError("a side must implement run")

    def resident_bytes(self) -> int:
        """Weights, frozen models and optimizer state."""
        tensors = [value for module in [self.task.training, *self.task.frozen] for value in module.state_dict().values()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        return sum(value.numel() * value.element_size() for value in {id(value): value for value in tensors}.values())


class Plain(Side):
    """Training loop of diffusers: fp32, images encoded in each step, data in the same thread, default AdamW."""

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__(task, device)
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-5)
        self.source = TimedBatches(self._batches(), device)

    def _batches(self) -> Iterator[tuple[torch.Tensor, TrainingBatch]]:
        while True:
            images, batch = host_batch(self.task.batch, self.task.images)
            yield images.to(self.device), batch.to(self.device)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            images, batch = next(self.source)
            with torch.no_grad():
                latents = self.task.encode(images)
            loss = self.task.loss(replace(batch, latents=latents))
            loss.backward()
            nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss.item()


class TimedBatches:
    """Iterator over batches that measures the time spent waiting for them, on the device if that is a GPU."""

    def __init__(self, batches: Iterator[Any], device: torch.device) -> None:
        self.batches = batches
        self.device = device
        self.waits: list[tuple[Any, Any]] = []

    def __next__(self) -> Any:
        begin = self._now()
        batch = next(self.batches)
        self.waits.append((begin, self._now()))
        return batch

    def waited(self) -> float:
        """Seconds since the last call."""
        wait(self.device)
        waits, self.waits = self.waits, []
        if self.device.type == "cuda":
            return sum(float(begin.elapsed_time(end)) for begin, end in waits) / 1000.0
        return sum(float(end - begin) for begin, end in waits)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event


class HostBatches(Dataset[TrainingBatch]):
    """Batches of a task with cached latents, for a DataLoader."""

    def __init__(self, task: Task, latents: torch.Tensor) -> None:
        self.batch, self.latents = task.batch, latents

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> TrainingBatch:
        latents, batch = host_batch(self.batch, self.latents)
        return replace(batch, latents=latents)


class Ours(Side):
    """The loop of stage `train`: configured optimizer, DataLoader, and on a GPU autocast and channels-last."""

    def __init__(self, task: Task, device: torch.device, compiled: bool) -> None:
        super().__init__(task, device)
        cuda = device.type == "cuda"
        self.optimizer = task.training.configure_optimizers()["optimizer"]
        self.amp = torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext()
        with torch.no_grad():
            latents = torch.cat([task.encode(part.to(device)).float().cpu() for part in task.images.split(4)])
        if cuda:
            task.training.unet.to(memory_format=torch.channels_last)
        loader: DataLoader[TrainingBatch] = DataLoader(
            HostBatches(task, latents), batch_size=None, num_workers=2 if cuda else 0, pin_memory=cuda
        )
        self.source = TimedBatches((batch.to(device) for batch in loader), device)
        if compiled:
            task.training.unet.compile(backend=inductor_or_eager)
            self.note = f"first step {timed(device, lambda: self.run(1)):.0f} s"

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self.source)
            with self.amp:
                loss = self.task.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()


def ours(arguments: argparse.Namespace, device: torch.device, compiled: bool) -> Side:
    """Side of the project, with frozen weights in the precision of `train`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Ours(sd15(arguments, device, dtype), device, compiled)


def host_batch(batch: TrainingBatch, first: torch.Tensor) -> tuple[torch.Tensor, TrainingBatch]:
    """Batch as a loader makes it, gathered by row, with new noise; and `first` in the same order."""
    rows = torch.randperm(len(first))
    shuffled = batch.map_tensors(lambda value: value[rows])
    return first[rows], replace(shuffled, noise=torch.randn(batch.noise.shape))


def timed(device: torch.device, work: Callable[[], None]) -> float:
    """Seconds of some work, including that of the device."""
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_of(task: Task, device: torch.device) -> float:
    """Floating-point operations of one forward and backward pass on one batch."""
    batch = task.batch.to(device)
    with FlopCounterMode(display=False) as counter:
        task.loss(batch).backward()
    task.training.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def measure(device: torch.device, arguments: argparse.Namespace, peak: float | None) -> dict[str, Any]:
    """Run the sides in turn."""
    sides: dict[str, Side] = {"plain diffusers loop": Plain(sd15(arguments, device, torch.float32), device)}
    task = sides["plain diffusers loop"].task
    flops, count = flops_of(task, device), len(task.images)
    sides["ours, eager"] = ours(arguments, device, compiled=False)
    if arguments.compile:
        sides["ours"] = ours(arguments, device, compiled=True)
    rows: dict[str, dict[str, Any]] = {side: {"seconds": [], "waited": [], "peak_gib": []} for side in sides}
    for side in sides.values():
        side.run(arguments.warm)
    for _ in range(arguments.rounds):
        for label, side in sides.items():
            before = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
            side.source.waited()
            rows[label]["seconds"].append(timed(device, partial(side.run, arguments.steps)))
            rows[label]["waited"].append(side.source.waited())
            if device.type == "cuda":
                most = torch.cuda.max_memory_allocated(device) - before + side.resident_bytes()
                rows[label]["peak_gib"].append(most / 2**30)
    plain = rows["plain diffusers loop"]["seconds"]
    found: dict[str, Any] = {}
    for label, side in sides.items():
        seconds = rows[label]["seconds"]
        rates = [arguments.steps * count / value for value in seconds]
        tflops = arguments.steps * flops / min(seconds) / 1e12
        found[label] = {
            "images_per_s": round(max(rates), 3),
            "images_per_s_median": round(statistics.median(rates), 3),
            "ratio_median": round(statistics.median(a / b for a, b in zip(plain, seconds, strict=True)), 2),
            "tflops": round(tflops, 4),
            "mfu": round(tflops / peak, 4) if peak else None,
            "peak_gib": round(max(rows[label]["peak_gib"]), 2) if rows[label]["peak_gib"] else None,
            "data_wait_ratio": round(sum(rows[label]["waited"]) / sum(seconds), 4),
            "note": side.note,
        }
    learning = sum(value.numel() for value in sides["ours, eager"].learning)
    everything = {id(value): value.numel() for part in [task.training, task.training.unet] for value in part.parameters()}
    return {
        "batch": count,
        "weights_m": round(sum(everything.values()) / 1e6, 2),
        "learning_m": round(learning / 1e6, 2),
        "tflop_per_image": round(flops / count / 1e12, 6),
        "sides": found,
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="timed steps of a round; default 20, reduced 3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on a GPU")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--reduced", action="store_true", help="narrow models; always so without a GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.reduced = arguments.reduced or device.type == "cpu"
    arguments.compile = device.type == "cuda" if arguments.compile is None else arguments.compile
    arguments.steps = arguments.steps or (3 if arguments.reduced else 20)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = peak_tflops(card) if device.type == "cuda" else None
    mark = "" if device.type == "cuda" and not arguments.reduced else REDUCED if device.type == "cpu" else "reduced"
    header = {"device": card, "peak_tflops": peak, "torch": torch.__version__, "reduced": mark, "load": os.getloadavg()[0]}
    print(f"{card}, peak {peak or 'unknown'} TFLOP/s bf16, torch {torch.__version__}, load {header['load']:.1f}")
    if mark:
        print(mark.upper() if device.type == "cpu" else mark)
    torch.manual_seed(0)
    result = measure(device, arguments, peak)
    table(result, mark)
    if arguments.json:
        arguments.json.write_text(json.dumps({**header, **result}, indent=2, sort_keys=True) + "\n")


def table(result: dict[str, Any], mark: str) -> None:
    """Print the rows of the sides."""
    line = f"{result['weights_m']} M weights, {result['learning_m']} M trained, batch {result['batch']}"
    print(f"\n{line}, {result['tflop_per_image']:.4g} TFLOP an image{f' ({mark})' if mark else ''}\n")
    print("| side | images/s (best) | median | ratio (median) | TFLOP/s | MFU | peak GiB | waiting | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side, row in result["sides"].items():
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "-"
        peak = row["peak_gib"] if row["peak_gib"] is not None else "-"
        rate = f"{row['images_per_s']:.4g} | {row['images_per_s_median']:.4g} | {row['ratio_median']:.2f}"
        print(f"| {side} | {rate} | {row['tflops']:.3g} | {mfu} | {peak} | {row['data_wait_ratio']:.1%} | {row['note']} |")
    assert all(math.isfinite(row["images_per_s"]) for row in result["sides"].values())


if __name__ == "__main__":
    main()
