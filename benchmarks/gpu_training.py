"""Training on one accelerator: images/s, MFU, peak memory and waiting, ours beside a plain diffusers loop, in one run.

Usage: python benchmarks/gpu_training.py [--models scratch,sd15] [--steps 20] [--rounds 3] [--reduced] [--json FILE] [--root .]

Two models with random weights (speed does not depend on them):

- scratch: the denoiser that `train` makes from params.yaml, at --scratch-widths and --scratch-size (the demo's are too small to
  say anything of a GPU);
- sd15: Stable Diffusion 1.5's U-Net (860 M weights) and autoencoder, 512 px; IP-Adapter key/value projections for 32 audio
  tokens learn, the rest is frozen.

Sides: `plain` is the loop of diffusers' examples: fp32, AdamW as it comes, pictures encoded in every step, data made in
the same thread, no fusion, no compile. `ours` is what `train` does on a GPU: bf16 autocast, latents made once, channels-last,
SDPA, fused AdamW, `train.compiling`'s rule for torch.compile, batches prepared ahead and copied beside the work; `ours, eager`
leaves the compiler out. Rounds are interleaved; images/s is that of the best round, beside the median.

MFU: floating-point operations of one forward and backward pass, counted by torch's FlopCounterMode on that very model (multiply
and add are two; frozen weights' gradients are not computed and not counted; encoding pictures is not counted), times steps/s,
over the card's published dense bf16 peak. Peak memory is what was allocated, the optimiser states of the other sides taken off.
Waiting: share of the time in which the device had no work because of data (`train.loading`).
On a machine with no GPU the models are narrow, the numbers test the script and say nothing of a GPU; the output says so.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline_steps.train.compiling import SHORTEST_S, pays
from pipeline_steps.train.loading import Ahead, Waiting

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
"""Dense bf16 tensor-core TFLOP/s from the makers' data sheets (SXM where nothing is said); the longest fitting name counts."""
REDUCED = "reduced, CPU: says nothing of a GPU"


def peak_tflops(name: str) -> float | None:
    """Published peak of a card by its CUDA name; None if it is not in the table."""
    fitting = [key for key in PEAK_TFLOPS if all(re.search(rf"\b{word}\b", name) for word in key.split())]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


@dataclass
class Task:
    """A model to be trained.

    Attributes:
        module: all its weights, those that learn asking for gradients.
        loss: of latents, other tensors by name and the module.
        encode: pictures -> latents, the frozen encoder's work.
        pictures, inputs: one batch on the CPU.
        convolutional: the part that is laid out channels-last and compiled.
    """

    name: str
    module: nn.Module
    loss: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]
    pictures: torch.Tensor
    inputs: dict[str, torch.Tensor]
    convolutional: nn.Module
    encoder: nn.Module


def scratch(arguments: argparse.Namespace, device: torch.device) -> Task:
    """The product's own denoiser, both parts at work."""
    from pipeline_steps.core.config import load_params
    from pipeline_steps.diffusion.codec import PatchCodec
    from pipeline_steps.diffusion.conditioning import SoundTokens
    from pipeline_steps.diffusion.flow import at_time, velocity
    from pipeline_steps.train.config import Config
    from pipeline_steps.train.module import new_conditioner, new_denoiser

    section = load_params(arguments.root / "params.yaml")["train"]
    section["picture_size"] = arguments.scratch_size
    section["unet"] = {**section["unet"], "widths": arguments.scratch_widths}
    config = Config.model_validate(section)
    conditioner = new_conditioner(config)
    denoiser = new_denoiser(config, conditioner).to(device)
    codec = PatchCodec(config.codec.channels, config.codec.whitening, config.codec.width)
    draws = torch.Generator().manual_seed(0)
    count, size = arguments.scratch_batch, config.picture_size
    pictures = torch.rand(count, 3, size, size, generator=draws) * 2 - 1
    codec.fit(pictures)
    codec = codec.to(device).requires_grad_(False).eval()
    denoiser.prior.fit(codec.encode(pictures.to(device)).cpu())
    denoiser = denoiser.to(device)
    part = config.conditioner
    side = size // 8
    inputs = {
        "frames": torch.randn(count, part.frames, part.frame_components, generator=draws),
        "summary": torch.randn(count, conditioner.summary_width, generator=draws),
        "noise": torch.randn(count, config.codec.channels, side, side, generator=draws),
        "times": torch.rand(count, generator=draws),
        "heard": torch.rand(count, generator=draws) > 0.15,
    }
    denoiser.refining = True
    denoiser.composer.requires_grad_(False)  # in this phase the composer is done

    def loss(latents: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        noisy = at_time(latents, given["noise"], given["times"])
        predicted = denoiser(noisy, given["times"], SoundTokens(given["frames"], given["summary"]), given["heard"])
        return (predicted.float() - velocity(latents, given["noise"])).square().mean()

    return Task("scratch", denoiser, loss, codec.encode, pictures, inputs, denoiser.unet, codec)


def sd15(arguments: argparse.Namespace, device: torch.device) -> Task:
    """Stable Diffusion 1.5's shape with IP-Adapter projections; `--reduced` divides its widths."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

    narrow = arguments.reduced
    widths = (32, 64, 64, 64) if narrow else (320, 640, 1280, 1280)
    tokens, token_width = 32, 64 if narrow else 768
    size, count = (64, 2) if narrow else (512, arguments.sd15_batch)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=size // 8,
            in_channels=4,
            out_channels=4,
            block_out_channels=widths,
            layers_per_block=2,
            cross_attention_dim=token_width,
            attention_head_dim=8,
            norm_num_groups=32,
        )
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32) if narrow else (128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=size,
        )
        resampler = nn.Sequential(nn.Linear(token_width, token_width), nn.GELU(), nn.Linear(token_width, token_width))
    unet.requires_grad_(False)
    vae.requires_grad_(False).eval()
    add_ip_adapter(unet, tokens)
    unet.to(device)
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    kept = schedule.alphas_cumprod.to(device)
    draws = torch.Generator().manual_seed(0)
    pictures = torch.rand(count, 3, size, size, generator=draws) * 2 - 1
    inputs = {
        "text": torch.randn(count, 77, token_width, generator=draws),
        "sound": torch.randn(count, tokens, token_width, generator=draws),
        "noise": torch.randn(count, 4, size // 8, size // 8, generator=draws),
        "times": torch.randint(1000, (count,), generator=draws),
    }

    def loss(latents: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        share = kept[given["times"]][:, None, None, None]
        noisy = share.sqrt() * latents + (1 - share).sqrt() * given["noise"]
        hidden = (given["text"], [resampler(given["sound"])])
        predicted = unet(noisy, given["times"], hidden, return_dict=False)[0]
        return F.mse_loss(predicted.float(), given["noise"])

    def encode(batch: torch.Tensor) -> torch.Tensor:
        return vae.encode(batch).latent_dist.mode() * 0.18215

    return Task("sd15", nn.ModuleList([unet, resampler]), loss, encode, pictures, inputs, unet, vae)


def add_ip_adapter(unet: Any, tokens: int) -> None:
    """IP-Adapter's key and value projections in every cross-attention: they learn, in fp32, the rest does not."""
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            processors[name] = AttnProcessor2_0()
            continue
        place = unet.mid_block if name.startswith("mid") else None
        for kind in ("down_blocks", "up_blocks"):
            if name.startswith(kind):
                place = getattr(unet, kind)[int(name.split(".")[1])]
        width = place.resnets[-1].out_channels  # type: ignore[union-attr]
        processors[name] = IPAdapterAttnProcessor2_0(width, unet.config.cross_attention_dim, num_tokens=(tokens,))
    unet.set_attn_processor(processors)


TASKS: dict[str, Callable[[argparse.Namespace, torch.device], Task]] = {"scratch": scratch, "sd15": sd15}


class Side:
    """One way to train a task: `run(n)` makes n steps; `waited` is the time the device had no data."""

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.device = device
        self.learning = [value for value in task.module.parameters() if value.requires_grad]
        self.note = ""
        self.optimiser: torch.optim.Optimizer

    def waited(self) -> float:
        """Seconds since the beginning in which there was nothing to do for want of data."""
        return 0.0

    def run(self, steps: int) -> None:
        """Make so many steps."""
        raise TypeError("a side says how it trains")

    def state_bytes(self) -> int:
        """What the optimiser remembers."""
        tensors = [value for state in self.optimiser.state.values() for value in state.values()]
        return sum(value.numel() * value.element_size() for value in tensors if torch.is_tensor(value))


class Plain(Side):
    """diffusers' training loop: fp32, pictures encoded in each step, data made in between, AdamW as it comes."""

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__(task, device)
        self.optimiser = torch.optim.AdamW(self.learning, lr=1e-5)
        self._source = Waiting(self._batches(), device)
        self._batch = iter(self._source)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield {name: value.to(self.device) for name, value in host_batch(self.task, self.task.pictures).items()}

    def waited(self) -> float:
        return self._source.waited()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self._batch)
            with torch.no_grad():
                latents = self.task.encode(batch.pop("first"))
            loss = self.task.loss(latents, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
            loss.item()


class Ours(Side):
    """What `train` does on a GPU. Swap the model in `TASKS`, the loop here."""

    def __init__(self, task: Task, device: torch.device, compiled: str, steps: int) -> None:
        super().__init__(task, device)
        self.optimiser = torch.optim.AdamW(self.learning, lr=1e-5, fused=True)
        self.amp = contextlib.nullcontext() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)
        with torch.no_grad():
            self.latents = task.encode(task.pictures.to(device)).float().cpu()
        self._source = Waiting(Ahead(self._batches(), 2, device), device)
        self._batch: Iterator[dict[str, torch.Tensor]] = iter(self._source)
        self.layout(True)
        if compiled != "off":
            self._probe(compiled, steps)
        self.compiled = task.convolutional._compiled_call_impl
        self.layout(False)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield host_batch(self.task, self.latents)

    def layout(self, ours: bool) -> None:
        """Channels-last (on a GPU) and the compiled call while this side runs, as it was otherwise: sides share the weights."""
        if self.device.type == "cuda":
            self.task.convolutional.to(memory_format=torch.channels_last if ours else torch.contiguous_format)
        self.task.convolutional._compiled_call_impl = getattr(self, "compiled", None) if ours else None

    def _probe(self, mode: str, steps: int) -> None:
        if mode == "auto":
            self._steps(3)
            eager = timed(self.device, lambda: self._steps(5)) / 5
            if self.device.type == "cpu" or eager * steps < SHORTEST_S:
                self.note = "not compiled (auto)"
                return
        self.task.convolutional.compile()
        begin = timed(self.device, lambda: self._steps(3))
        if mode == "auto":
            now = timed(self.device, lambda: self._steps(5)) / 5
            if not pays(eager, now, begin - 3 * eager, steps):
                self.task.convolutional._compiled_call_impl = None
                self.note = f"compile would not pay: {eager * 1000:.1f} -> {now * 1000:.1f} ms, {begin:.0f} s to compile"
                return
        self.note = f"compiled in {begin:.0f} s"

    def waited(self) -> float:
        return self._source.waited()

    def run(self, steps: int) -> None:
        self.layout(True)
        self._steps(steps)
        self.layout(False)

    def _steps(self, steps: int) -> None:
        for _ in range(steps):
            batch = next(self._batch)
            with self.amp:
                loss = self.task.loss(batch.pop("first"), batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.learning, 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            loss.item()


def ours(task: Task, device: torch.device, compiled: str, steps: int) -> Side:
    """The one place where our side is made."""
    return Ours(task, device, compiled, steps)


def host_batch(task: Task, first: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch as a loader makes it: gathered by row from what lies in memory, noise drawn anew."""
    rows = torch.randperm(len(first))
    batch = {name: value[rows] for name, value in task.inputs.items()}
    batch["noise"] = torch.randn(task.inputs["noise"].shape)
    return {"first": first[rows], **batch}


def timed(device: torch.device, work: Callable[[], None]) -> float:
    """Seconds of some work, the device's share included."""
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_of(task: Task, device: torch.device) -> float:
    """Of one forward and backward pass on one batch."""
    given = {name: value.to(device) for name, value in task.inputs.items()}
    with torch.no_grad():
        latents = task.encode(task.pictures.to(device))
    with FlopCounterMode(display=False) as counter:
        task.loss(latents, given).backward()
    task.module.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def measure(task: Task, device: torch.device, arguments: argparse.Namespace, peak: float | None) -> dict[str, Any]:
    """Sides in turn, round by round."""
    flops, count = flops_of(task, device), len(task.pictures)
    sides: dict[str, Side] = {"plain diffusers loop": Plain(task, device), "ours, eager": ours(task, device, "off", 0)}
    if arguments.compile != "off":
        sides["ours"] = ours(task, device, arguments.compile, arguments.run_steps)
    rows: dict[str, dict[str, Any]] = {name: {"seconds": [], "waited": [], "peak_gib": []} for name in sides}
    for side in sides.values():
        side.run(arguments.warm)
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            waited = side.waited()
            rows[name]["seconds"].append(timed(device, lambda side=side: side.run(arguments.steps)))  # type: ignore[misc]
            rows[name]["waited"].append(side.waited() - waited)
            if device.type == "cuda":
                others = sum(other.state_bytes() for other in sides.values() if other is not side)
                rows[name]["peak_gib"].append((torch.cuda.max_memory_allocated(device) - others) / 2**30)
    plain = rows["plain diffusers loop"]["seconds"]
    found: dict[str, Any] = {}
    for name, side in sides.items():
        seconds = rows[name]["seconds"]
        rates = [arguments.steps * count / value for value in seconds]
        tflops = arguments.steps * flops / min(seconds) / 1e12
        found[name] = {
            "images_per_s": round(max(rates), 3),
            "images_per_s_median": round(statistics.median(rates), 3),
            "ratio_median": round(statistics.median(a / b for a, b in zip(plain, seconds, strict=True)), 2),
            "tflops": round(tflops, 4),
            "mfu": round(tflops / peak, 4) if peak else None,
            "peak_gib": round(max(rows[name]["peak_gib"]), 2) if rows[name]["peak_gib"] else None,
            "wait_share": round(sum(rows[name]["waited"]) / sum(seconds), 4),
            "note": side.note,
        }
    learning = sum(value.numel() for value in task.module.parameters() if value.requires_grad)
    everything = sum(value.numel() for value in task.module.parameters())
    return {
        "batch": count,
        "weights_m": round(everything / 1e6, 2),
        "learning_m": round(learning / 1e6, 2),
        "tflop_per_image": round(flops / count / 1e12, 6),
        "sides": found,
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="scratch,sd15")
    parser.add_argument("--steps", type=int, help="timed steps of a round; default 20, reduced 3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--run-steps", type=int, default=20_000, help="steps of the run that compiling has to pay in")
    parser.add_argument("--sd15-batch", type=int, default=16)
    parser.add_argument("--scratch-batch", type=int, help="default 256, reduced 4")
    parser.add_argument("--scratch-size", type=int, help="px; default 256, reduced 64")
    parser.add_argument("--scratch-widths", type=int, nargs="+", help="default 256 512 768, reduced 32 64")
    parser.add_argument("--reduced", action="store_true", help="narrow models; always so without a GPU")
    parser.add_argument("--root", type=Path, default=PROJECT)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments.reduced = arguments.reduced or device.type == "cpu"
    arguments.steps = arguments.steps or (3 if arguments.reduced else 20)
    arguments.scratch_batch = arguments.scratch_batch or (4 if arguments.reduced else 256)
    arguments.scratch_size = arguments.scratch_size or (64 if arguments.reduced else 256)
    arguments.scratch_widths = arguments.scratch_widths or ([32, 64] if arguments.reduced else [256, 512, 768])
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    peak = peak_tflops(card) if device.type == "cuda" else None
    mark = "" if device.type == "cuda" and not arguments.reduced else REDUCED if device.type == "cpu" else "reduced"
    header = {"device": card, "peak_tflops": peak, "torch": torch.__version__, "reduced": mark, "load": os.getloadavg()[0]}
    print(f"{card}, peak {peak or 'not known'} TFLOP/s bf16, torch {torch.__version__}, load {header['load']:.1f}")
    if mark:
        print(mark.upper() if device.type == "cpu" else mark)
    results: dict[str, Any] = {}
    for name in arguments.models.split(","):
        torch.manual_seed(0)
        task = TASKS[name](arguments, device)
        results[name] = measure(task, device, arguments, peak)
        table(name, results[name], mark)
        del task
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps({**header, "models": results}, indent=2, sort_keys=True) + "\n")


def table(name: str, result: dict[str, Any], mark: str) -> None:
    """Print one model's rows."""
    told = f"{result['weights_m']} M weights, {result['learning_m']} M learn, batch {result['batch']}"
    print(f"\n{name}: {told}, {result['tflop_per_image']:.4g} TFLOP an image{f' ({mark})' if mark else ''}\n")
    print("| side | images/s (best) | median | ratio (median) | TFLOP/s | MFU | peak GiB | waiting | |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side, row in result["sides"].items():
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "-"
        peak = row["peak_gib"] if row["peak_gib"] is not None else "-"
        rate = f"{row['images_per_s']:.4g} | {row['images_per_s_median']:.4g} | {row['ratio_median']:.2f}"
        print(f"| {side} | {rate} | {row['tflops']:.3g} | {mfu} | {peak} | {row['wait_share']:.1%} | {row['note']} |")
    assert all(math.isfinite(row["images_per_s"]) for row in result["sides"].values())


if __name__ == "__main__":
    main()
