"""Rates of CLAP, AST, captioning and sampling, compared with plain loops.

Usage: python -m benchmarks.gpu_pipeline [--parts clap ast captions sampling] [--rounds 3] [--json FILE]

On a GPU the networks have their published shapes: CLAP htsat-unfused (HTSAT-tiny, RoBERTa-base), AST base (12 layers of 768),
LLaVA of CLIP ViT-L/14-336 and a 1.1-billion Llama, U-Net and autoencoder of Stable Diffusion 1.5, the model of stage `train`.
Without a GPU the networks are small and the items few; such a run only tests the benchmark. Weights are random, so quality is
not measured.

Both sides run in turn in one process, after a warm-up round; rates are the best of the rounds, the ratio is the median over
rounds. Memory is the peak of a side above the weights that were loaded before (GPU only).

- plain: one item at a time, float32, the extractors of transformers and the pipeline of diffusers as documented.
- ours: the code of the project (`Clap`, `AstTokens`, `Vlm`, `AudioConditionedPipeline`), batched, bfloat16 on a GPU. Sampling
  is the pipeline of diffusers in both, with the batch, precision, memory format and solver of the project.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import diffusers
import numpy as np
import soundfile
import soxr
import torch
import transformers
from PIL import Image

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
diffusers.logging.set_verbosity_error()

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@dataclass(frozen=True)
class Side:
    """One implementation of a part: function, items per call, and generated tokens, if any."""

    name: str
    work: Callable[[], object]
    items: int
    tokens: int = 0


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and peak GPU megabytes above what was allocated before."""
    before = 0.0
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    start = time.perf_counter()
    work()
    if GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**20 - before if GPU else 0.0


def compare(part: str, sides: list[Side], rounds: int) -> list[dict[str, Any]]:
    """Run the sides in turn; the first one is the baseline."""
    for side in sides:
        side.work()
    runs = [[timed(side.work) for side in sides] for _ in range(rounds)]
    rows = []
    for place, side in enumerate(sides):
        rates = [side.items / run[place][0] for run in runs]
        ratios = [rate / (sides[0].items / run[0][0]) for rate, run in zip(rates, runs, strict=True)]
        row: dict[str, Any] = {
            "part": part, "side": side.name, "items": side.items, "items_per_second": round(max(rates), 3),
            "ratio": round(statistics.median(ratios), 2),
        }  # fmt: skip
        if side.tokens:
            row["tokens_per_second"] = round(max(rates) * side.tokens / side.items, 1)
        if GPU:
            row["peak_mb"] = round(max(run[place][1] for run in runs))
        rows.append(row)
        line = f"{row['items_per_second']:10.2f} items/s, ratio {row['ratio']:6.2f}"
        line += f", {row['tokens_per_second']:8.1f} tokens/s" if side.tokens else ""
        line += f", peak {row['peak_mb']} MB above the weights" if GPU else ""
        print(f"{part:9} {side.name:44} {line}", flush=True)
    return rows


def sound_files(folder: Path, count: int) -> list[Path]:
    """Ten-second stereo files at 44.1 kHz in four formats."""
    random = np.random.default_rng(0)
    files = []
    for number in range(count):
        kind = ("flac", "mp3", "ogg", "wav")[number % 4]
        files.append(folder / f"{number}.{kind}")
        slow = np.repeat(random.standard_normal((100, 2)), 4410, axis=0) * random.standard_normal((441_000, 2))
        soundfile.write(files[-1], np.clip(0.1 * slow, -1, 1), 44_100)
    return files


def read(file: Path) -> np.ndarray:
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return np.asarray(soxr.resample(samples.mean(1), rate, 48_000, quality="HQ"), np.float32)[:480_000]


def clap(scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Embedding of audio files."""
    from transformers import ClapFeatureExtractor, ClapModel

    from pipeline_steps.core.project_paths import ProjectPaths
    from pipeline_steps.models.text_audio.clap import ClapEncoder, ClapEncoderConfig
    from tests.factories.checkpoints.clap import clap_checkpoint

    folder = clap_checkpoint(scratch / "clap", full_size=GPU)
    files = sound_files(scratch, 256 if GPU else 8)
    few = files[: 32 if GPU else 4]
    model = ClapModel.from_pretrained(folder).eval().to(DEVICE)
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    encoder = ClapEncoder(ClapEncoderConfig(model=str(folder)), ProjectPaths(Path())).load()

    @torch.inference_mode()
    def plain() -> np.ndarray:
        rows = []
        for file in few:
            inputs = extractor(read(file), sampling_rate=48_000, padding="repeat", return_tensors="pt").to(DEVICE)
            rows.append(model.get_audio_features(**inputs).pooler_output.float().cpu())
        return torch.cat(rows).numpy()

    def ours(chosen: list[Path] = files) -> np.ndarray:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return encoder.audio_rows(list(pool.map(lambda file: encoder.prepare_audio(read(file)), chosen)))

    wanted, made = plain(), ours(few)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    print(f"clap      smallest cosine between the two: {(wanted * made).sum(1).min():.6f}")
    return compare("clap", [Side("plain, files one by one", plain, len(few)), Side("ours", ours, len(files))], rounds)


def ast(scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Tokens of ten-second clips."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    from pipeline_steps.models.audio.ast import AstEncoder
    from tests.factories.checkpoints.ast import ast_checkpoint

    folder = scratch / "ast"
    if GPU:
        ASTModel(ASTConfig()).save_pretrained(folder)
        ASTFeatureExtractor().save_pretrained(folder)
    else:
        ast_checkpoint(folder)
    random = np.random.default_rng(1)
    sounds = [(0.1 * random.standard_normal(491_520)).astype(np.float32) for _ in range(128 if GPU else 8)]
    few = sounds[: 16 if GPU else 4]
    model, extractor = ASTModel.from_pretrained(folder).eval().to(DEVICE), ASTFeatureExtractor.from_pretrained(folder)
    encoder = AstEncoder(str(folder)).load()

    @torch.inference_mode()
    def plain() -> None:
        for sound in few:
            low = soxr.resample(sound, 48_000, 16_000)
            inputs = extractor(low, sampling_rate=16_000, return_tensors="pt").to(DEVICE)
            model(**inputs).last_hidden_state.cpu()

    sides = [
        Side("plain, sounds one by one", plain, len(few)),
        Side("ours", lambda: encoder.grids(sounds), len(sounds)),
    ]
    return compare("ast", sides, rounds)


def captions(scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Captions of a fixed length; decoding is not constrained to JSON, because the weights are random."""
    from transformers import LlavaForConditionalGeneration

    from pipeline_steps.caption.captioners.base import CaptionOptions
    from pipeline_steps.caption.captioners.prompt import PromptConfig, caption_prompt
    from pipeline_steps.caption.captioners.vlm import VlmCaptioner, VlmConfig
    from tests.factories.checkpoints.vlm import llava

    folder = llava(scratch / "llava", full_size=GPU)
    words, batch = (128, 32) if GPU else (16, 8)
    random = np.random.default_rng(2)
    pictures = [random.integers(0, 256, (256, 256, 3), dtype=np.uint8) for _ in range(batch * 2)]
    few = pictures[: 4 if GPU else 2]
    prompt = caption_prompt(5)
    config = VlmConfig(model=str(folder), constrained_decoding=False)
    encoder = VlmCaptioner(config, CaptionOptions(prompt=PromptConfig(max_new_tokens=words))).load()
    encoder._model.generation_config.min_new_tokens = words
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval().to(DEVICE)
    processor = encoder._processor
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
        tokenize=False,
    )

    @torch.inference_mode()
    def plain() -> None:
        for picture in few:
            inputs = processor(text=[text], images=[[Image.fromarray(picture)]], return_tensors="pt").to(DEVICE)
            model.generate(**inputs, do_sample=False, max_new_tokens=words, min_new_tokens=words)

    def ours() -> None:
        for start in range(0, len(pictures), batch):
            part = pictures[start : start + batch]
            encoder._prompt_model(part, [prompt] * len(part))

    sides = [
        Side("plain, pictures one by one", plain, len(few), len(few) * words),
        Side(f"ours, batches of {batch}", ours, len(pictures), len(pictures) * words),
    ]
    return compare("captions", sides, rounds)


def sampling(scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Images of Stable Diffusion 1.5 with guidance."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    small = {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32,
        "attention_head_dim": 8, "norm_num_groups": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    unet = UNet2DConditionModel(**({"sample_size": 64, "cross_attention_dim": 768} if GPU else small))
    widths, levels = ((128, 256, 512, 512), 4) if GPU else ((16, 16, 16, 16), 4)
    vae = AutoencoderKL(
        block_out_channels=widths, layers_per_block=2 if GPU else 1, latent_channels=4, norm_num_groups=32 if GPU else 8,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
    )  # fmt: skip
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    width, batch = unet.config.cross_attention_dim, 8 if GPU else 4
    prompt, empty = torch.randn(1, 77, width), torch.zeros(1, 77, width)

    def pipeline(scheduler: Any, dtype: torch.dtype) -> Any:
        parts = {name: type(part).from_config(part.config) for name, part in (("unet", unet), ("vae", vae))}
        for name, part in (("unet", unet), ("vae", vae)):
            parts[name].load_state_dict(part.state_dict())
        made = StableDiffusionPipeline(
            **parts, scheduler=scheduler, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        ).to(DEVICE, dtype)  # fmt: skip
        if dtype == torch.bfloat16:
            made.unet.to(memory_format=torch.channels_last)
            made.vae.to(memory_format=torch.channels_last)
        made.set_progress_bar_config(disable=True)
        return made

    fast = torch.bfloat16 if GPU else torch.float32
    plain = pipeline(DDIMScheduler(**noise, clip_sample=False, set_alpha_to_one=False, steps_offset=1), torch.float32)
    ours = pipeline(plain.scheduler, fast)
    ddim, solver = plain.scheduler, DPMSolverMultistepScheduler(**noise, algorithm_type="dpmsolver++")

    def draw(pipe: Any, scheduler: Any, steps: int, count: int) -> None:
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        embeds = {"prompt_embeds": prompt, "negative_prompt_embeds": empty}
        placed = {name: value.to(DEVICE, pipe.unet.dtype) for name, value in embeds.items()}
        pipe(**placed, num_inference_steps=steps, num_images_per_prompt=count, guidance_scale=7.5, output_type="pt")

    precision = "bfloat16, channels last" if GPU else "float32"
    return compare(
        "sampling",
        [
            Side("plain: DDIM 50 steps, one by one, float32", lambda: draw(plain, ddim, 50, 1), 1),
            Side(f"DDIM 50 steps, {batch} together, {precision}", lambda: draw(ours, ddim, 50, batch), batch),
            Side(f"DPM-Solver++ 20 steps, {batch} together", lambda: draw(ours, solver, 20, batch), batch),
            Side(f"DPM-Solver++ 10 steps, {batch} together", lambda: draw(ours, solver, 10, batch), batch),
        ],
        rounds,
    )


PARTS = {"clap": clap, "ast": ast, "captions": captions, "sampling": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0: as it chooses")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    machine = torch.cuda.get_device_name() if GPU else f"no GPU, {os.cpu_count()} CPU cores"
    size = "published shapes" if GPU else "REDUCED: small networks, few items; not comparable with full size"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{machine}; load {os.getloadavg()[0]:.1f}; {versions}; {size}; random weights\n", flush=True)
    rows: list[dict[str, Any]] = []
    for name in given.parts:
        with tempfile.TemporaryDirectory() as scratch:
            rows += PARTS[name](Path(scratch), given.rounds)
        if GPU:
            torch.cuda.empty_cache()
        print(flush=True)
    if given.json:
        report = {"machine": machine, "reduced": not GPU, "versions": versions, "rows": rows}
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
