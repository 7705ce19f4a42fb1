"""Preset `full` at true size with random weights on a CPU: caption, embed, train, draw, stock diffusers, judge.

Usage: python -m benchmarks.full_size --scratch DIR [--stages caption ...] [--tiny]

Run in the root of the repository after stage `assets`. Configurations are those of the published models, except that the
captioner is Qwen3-VL-2B, the smallest of its family: an 8-billion model has 16 GB in bfloat16. Weights are made on the spot,
one model at a time, and written to DIR (6 GB at most). Each stage is a process of its own. Its peak is sampled: private memory,
and with mapped files, which the kernel may drop. Weights are random, so results say that the parts fit together and nothing
about quality. `--tiny` replaces every model by a tiny one of the same class.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from pipeline_steps.core.array_types import ByteArray, FloatArray

SHARD_VALUES = 500_000_000
"""Values of a file of weights; so many are in memory at once."""
SOUNDS = IMAGES = 3


def demo_images() -> list[ByteArray]:
    """First images of the demo."""
    paths = sorted(Path("data/demo/images").glob("i-t*.webp"))[:IMAGES]
    return [np.asarray(Image.open(path).convert("RGB").resize((256, 256)), np.uint8) for path in paths]


def demo_sounds() -> list[FloatArray]:
    """First sounds of the demo, mono at 48 kHz."""
    import soxr

    clips = []
    for path in sorted(Path("data/demo/sounds").glob("s-b*.ogg"))[:SOUNDS]:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        clips.append(np.asarray(soxr.resample(samples.mean(1), rate, 48_000), np.float32)[:480_000])
    return clips


def write_random(model: Any, folder: Path) -> None:
    """Write random bfloat16 weights of a model on the `meta` device as sharded safetensors.

    Matrices have small values, vectors (norms, biases) are 1 or 0. The output layer is zero, so that constrained decoding takes
    the first token that the grammar allows and ends.
    """
    from safetensors.torch import save_file

    noise = (0.02 * torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))).bfloat16()
    shards: list[dict[str, torch.Tensor]] = [{}]
    index: dict[str, str] = {}
    values = total = 0

    def flush() -> None:
        nonlocal values
        name = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}
        shards.append({})
        values = 0

    for name, place in model.state_dict().items():
        if name == "lm_head.weight" or name.endswith("bias"):
            value = torch.zeros(place.shape, dtype=torch.bfloat16)
        elif place.ndim < 2:
            value = torch.ones(place.shape, dtype=torch.bfloat16)
        else:
            value = noise.repeat(-(-place.numel() // len(noise)))[: place.numel()].view(place.shape)
        shards[-1][name] = value.contiguous()
        values, total = values + place.numel(), total + place.numel()
        if values >= SHARD_VALUES:
            flush()
    flush()
    content = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def make_captioner(folder: Path, tiny: bool) -> None:
    """Qwen3-VL-2B with the tokenizer of the tests, whose vocabulary is padded to the published width."""
    from tests.factories.checkpoints import vlm

    vlm.qwen3_vl(folder)
    if tiny:
        return
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = Qwen3VLConfig.from_pretrained(folder)
    text = {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6,
        },
    }  # fmt: skip
    vision = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2048, "num_heads": 16,
        "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    for part, values in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in values.items():
            setattr(part, name, value)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False  # the output layer is zero, the input is not
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=16, min_pixels=65_536, max_pixels=16_777_216).save_pretrained(folder)
    write_random(model, folder)


def caption(folder: Path, tiny: bool) -> str:
    """Three images to captions, in bfloat16, decoded by the JSON schema."""
    from pipeline_steps.caption.captioners.base import CaptionFailure, CaptionOptions
    from pipeline_steps.caption.captioners.vlm import VlmCaptioner, VlmConfig

    settings = {"model": str(folder / "captioner"), "dtype": "float32" if tiny else "bfloat16"}
    config = VlmConfig.model_validate(settings)
    found = VlmCaptioner(config, CaptionOptions()).load().predict(demo_images())
    valid = sum(not isinstance(response, CaptionFailure) for response in found)
    return f"{valid} of {len(found)} images with a valid response"


def make_clap(folder: Path, tiny: bool) -> None:
    from tests.factories.checkpoints.clap import clap_checkpoint

    clap_checkpoint(folder, full_size=not tiny)


def embed(folder: Path, tiny: bool) -> str:
    """Three sounds and three texts to vectors."""
    from tests.factories.checkpoints.clap import clap_encoder

    encoder = clap_encoder(folder / "clap").load()
    audio = encoder.audio_rows([encoder.prepare_audio(clip) for clip in demo_sounds()])
    text = encoder.text_rows(["a dog barks", "rain on a roof", "waves on a beach"])
    assert np.isfinite(audio).all()
    assert np.isfinite(text).all()
    return f"{len(audio)} sounds, {len(text)} texts, {audio.shape[1]} dimensions"


def make_training(folder: Path, tiny: bool) -> None:
    """AST base and Stable Diffusion 1.5; the U-Net is stored in bfloat16."""
    from tests.factories.checkpoints.ast import ast_checkpoint
    from tests.factories.checkpoints.stable_diffusion import clip_tokenizer, stable_diffusion

    if tiny:
        ast_checkpoint(folder / "ast")
        stable_diffusion(folder / "backbone")
        return
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    ASTModel(ASTConfig()).save_pretrained(folder / "ast")
    ASTFeatureExtractor().save_pretrained(folder / "ast")
    backbone = folder / "backbone"
    words = clip_tokenizer(backbone / "tokenizer")
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    text = CLIPTextConfig(
        vocab_size=49_408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ends
    )
    CLIPTextModel(text).save_pretrained(backbone / "text_encoder")
    UNet2DConditionModel(sample_size=64, cross_attention_dim=768).bfloat16().save_pretrained(backbone / "unet")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(backbone / "vae")  # fmt: skip
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(backbone / "scheduler")
    parts = {
        "scheduler": ["diffusers", "PNDMScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "safety_checker": [None, None], "feature_extractor": [None, None],
    }  # fmt: skip
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    (backbone / "model_index.json").write_text(json.dumps(index))


def write_project(folder: Path) -> None:
    """Media and pairs of three images and three sounds: two pairs of split `train`, one of `val`."""
    from pipeline_steps.core.media_shards import write_index, write_shards
    from pipeline_steps.core.project_paths import ProjectPaths
    from pipeline_steps.core.schemas import PAIRS
    from pipeline_steps.core.tables import write_table

    def png(pixels: ByteArray) -> bytes:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        return buffer.getvalue()

    def flac(samples: FloatArray) -> bytes:
        soundfile.write(buffer := io.BytesIO(), samples, 48_000, format="FLAC", subtype="PCM_16")
        return buffer.getvalue()

    layout = ProjectPaths(folder)
    images = {f"{number:032x}": png(pixels) for number, pixels in enumerate(demo_images())}
    sounds = {f"{number + 16:032x}": flac(clip) for number, clip in enumerate(demo_sounds())}
    rows = write_shards(layout.media, "image", images, "png") + write_shards(layout.media, "audio", sounds, "flac")
    write_index(layout.media, rows)
    nothing = dict.fromkeys(("license", "image_license", "audio_license"))
    pairs = [
        {
            "pair_id": f"pair-{number}", "image_id": image, "image_group": image, "audio_group": sound, "score": 0.5,
            "z_score": 3.0, "tracks": [{"audio_id": sound, "phrase": "a sound", "gain_db": 0.0}],
            "split": "val" if number == 2 else "train", **nothing,
        }
        for number, (image, sound) in enumerate(zip(images, sounds, strict=True))
    ]  # fmt: skip
    write_table(layout.pairs / "pairs.parquet", PAIRS, pairs)
    layout.assets.symlink_to(Path("data/assets").resolve())


def train(folder: Path, tiny: bool) -> str:
    """Two steps of preset `full` at 512 px, batch 2, one image in the sample grid; exported by the stage."""
    from pipeline_steps.core.config import load_params
    from pipeline_steps.core.presets import load_overlay, merge
    from pipeline_steps.core.project_paths import ProjectPaths
    from pipeline_steps.train import stage

    write_project(folder)
    params = load_params(Path("params.yaml"))
    merge(params, load_overlay(Path(), "full"))
    smaller: dict[str, Any] = {
        "device": "cpu",
        "audio": {"ast": {"model": "ast", "revision": ""}, "num_augmentations": 1, "reverb_prob": 0.0},
        "performance": {"accumulate_grad_batches": 1, "gradient_checkpointing": True, "devices": 1},
        "sampling": {"num_inference_steps": 1},
        "ip_adapter": {
            "backbone": {"model": "backbone", "revision": ""},
            "phases": {"adapter": {"max_steps": 2, "batch_size": 2}},
        },
    }
    if tiny:
        smaller |= {"resolution": 64}
    merge(params, {"train": smaller})
    config = stage.TrainConfig.from_params(params["train"])
    report = stage.run(config, ProjectPaths(folder))
    size = (ProjectPaths(folder).model / "ip_adapter.safetensors").stat().st_size / 1e6
    return f"2 steps, {report.metrics['num_parameters'] / 1e6:.1f} M weights trained, ip_adapter.safetensors {size:.0f} MB"


def draw(folder: Path, tiny: bool) -> str:
    """Image of a sound by the exported model; the condition is written for the stock pipeline."""
    from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline

    pipeline: Any = AutoAudio2ImagePipeline.from_pretrained(folder / "models/audio2image", "cpu")
    images = pipeline(demo_sounds()[0], num_samples=1, num_inference_steps=2)
    Image.fromarray(images[0]).save(folder / "drawn.png")
    torch.save(pipeline.stock_arguments(demo_sounds()[0]), folder / "condition.pt")
    return f"{images.shape[1]} px, 2 sampling steps"


def stock(folder: Path, tiny: bool) -> str:
    """Image by stock diffusers with the exported file, in a process that does not import the project."""
    side = 64 if tiny else 512
    code = f"""
import sys, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained("backbone", safety_checker=None, torch_dtype=torch.float32)
pipe.load_ip_adapter("models/audio2image", subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
pipe.set_progress_bar_config(disable=True)
given = torch.load("condition.pt", weights_only=True)
image = pipe(**given, num_inference_steps=2, height={side}, width={side}).images[0]
assert not any(name.startswith("pipeline_steps") for name in sys.modules)
image.save("stock.png")
"""
    subprocess.run([sys.executable, "-c", code], cwd=folder, env={"PATH": "/usr/bin", "HOME": str(folder)}, check=True)
    return f"{Image.open(folder / 'stock.png').width} px, 2 sampling steps"


def make_judge(folder: Path, tiny: bool) -> None:
    from tests.factories.checkpoints.vision_towers import dinov2_checkpoint

    if tiny:
        dinov2_checkpoint(folder)
        return
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3, do_convert_rgb=True, image_mean=mean,
        image_std=std,
    ).save_pretrained(folder)  # fmt: skip


def evaluate(folder: Path, tiny: bool) -> str:
    """Features of the judge for the generated and the real images, and their similarity."""
    from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES, JudgeSetup

    setup = JudgeSetup(Path("data/assets"), folder, model=str(folder / "judge"), device="cpu")
    judge: Any = IMAGE_JUDGES.get("dinov2").from_setup(setup)
    judge.load()
    drawn = np.asarray(Image.open(folder / "drawn.png"), np.uint8)
    rows = judge.features([drawn, *demo_images()])
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = ", ".join(f"{value:.3f}" for value in unit[1:] @ unit[0])
    return f"{len(rows)} images, {rows.shape[1]} dimensions; similarity to real images {similar}"


STAGES: dict[str, tuple[str, Callable[[Path, bool], None] | None, Callable[[Path, bool], str]]] = {
    "caption": ("captioner", make_captioner, caption),
    "embed": ("clap", make_clap, embed),
    "train": ("", make_training, train),
    "draw": ("", None, draw),
    "stock diffusers": ("", None, stock),
    "judge": ("judge", make_judge, evaluate),
}
"""Stage -> folder of its weights (below the scratch folder), what makes them, and what runs."""


def memory_gb(process: int) -> tuple[float, float]:
    """Private and total resident memory of a process and its children, in GB."""
    import psutil

    private = total = 0
    try:
        for member in [psutil.Process(process), *psutil.Process(process).children(recursive=True)]:
            lines = (line.split() for line in Path(f"/proc/{member.pid}/status").read_text().splitlines())
            fields = {line[0]: int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmRSS:")}
            private, total = private + fields.get("RssAnon:", 0), total + fields.get("VmRSS:", 0)
    except (psutil.NoSuchProcess, OSError):
        return 0.0, 0.0
    return private / 1e6, total / 1e6


def measured(arguments: list[str]) -> tuple[str, float, float, float]:
    """Last line of a child's output, its seconds, and its peaks of private and resident memory in GB."""
    start, private, total = time.monotonic(), 0.0, 0.0
    command = [sys.executable, "-m", "benchmarks.full_size", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        while child.poll() is None:
            now = memory_gb(child.pid)
            private, total = max(private, now[0]), max(total, now[1])
            time.sleep(0.05)
        output = child.stdout.read() if child.stdout is not None else ""
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {child.returncode}")
    return (output.strip().splitlines() or [""])[-1], time.monotonic() - start, private, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--make", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        name, make, _ = STAGES[options.make]
        assert make is not None
        make(options.scratch / name, options.tiny)
        return
    if options.run:
        print(STAGES[options.run][2](options.scratch, options.tiny))
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    common = ["--scratch", str(options.scratch.resolve()), *["--tiny"] * options.tiny]
    print("| stage | weights made, s | ran, s | peak, private GB | with mapped files, GB | result |")
    print(f"|{'---|' * 6}", flush=True)
    for stage in options.stages:
        name, make, _ = STAGES[stage]
        made = measured(["--make", stage, *common]) if make is not None else ("", 0.0, 0.0, 0.0)
        result, seconds, private, total = measured(["--run", stage, *common])
        private, total = max(private, made[2]), max(total, made[3])
        before = f"{made[1]:.0f}" if make is not None else ""
        print(f"| {stage} | {before} | {seconds:.0f} | {private:.1f} | {total:.1f} | {result} |", flush=True)
        if name:
            shutil.rmtree(options.scratch / name)


if __name__ == "__main__":
    main()
