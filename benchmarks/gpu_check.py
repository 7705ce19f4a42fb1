"""Checks and measurements of a machine with one GPU, in under eight minutes; `gpu_check.sh` installs what it needs and runs it.

Usage: python -m benchmarks.gpu_check [--parts card correct memory resume training pipeline] [--out DIR] [--smoke]

Each part is a process of its own with a time limit. Its rows are written to DIR/rows.jsonl when they are found, so a part that
fails or runs past its limit keeps those before. The last output is one Markdown table. `--smoke` runs reduced networks on a
CPU, with four times the limits: it checks this script, not a machine.
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

warnings.filterwarnings("ignore")

import numpy as np
import torch

LIMITS = {"card": 20, "correct": 60, "memory": 45, "resume": 60, "training": 150, "pipeline": 100}
"""Seconds of each part; their sum, 435, leaves time to install."""
GIB = 2**30
CARD_GIB = 24
"""Memory of the smallest card that preset `full` must fit."""

Row = tuple[str, str, str, bool | None]
"""What, value, bar, and whether it is met; None without a bar."""


def card(smoke: bool) -> Iterator[Row]:
    """Names and versions."""
    import diffusers
    import transformers

    yield "versions", f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}", "", None
    yield "libraries", f"transformers {transformers.__version__}, diffusers {diffusers.__version__}", "", None
    if smoke:
        yield "card", f"none, {os.cpu_count()} CPU cores", "", None
        return
    properties = torch.cuda.get_device_properties(0)
    yield "card", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB", "a GPU", True
    yield "bfloat16", str(torch.cuda.is_bf16_supported(including_emulation=False)), "in hardware", None
    yield "one addition on it", str(float((torch.ones(8, device="cuda") + 1).sum())), "16.0", True


def correct(smoke: bool) -> Iterator[Row]:
    """Results of the GPU against those of the CPU."""
    device = "cpu" if smoke else "cuda"
    with tempfile.TemporaryDirectory() as scratch:
        yield from _constraint(device)
        yield from _search(device)
        yield from _prefetch(Path(scratch), device)
        yield from _encoders(Path(scratch), device, smoke)


def _constraint(device: str) -> Iterator[Row]:
    """JSON from random scores at the output width of Qwen2.5-VL."""
    from pipeline_steps.caption.captioners.json_decoding import JsonSchemaGrammar
    from tests.factories.checkpoints.vlm import tokenizer

    words, width = tokenizer("<image>"), 152_064
    events = {"type": "array", "items": {"enum": ["dog", "rain"]}, "maxItems": 3}
    schema = {"type": "object", "properties": {"events": events}, "required": ["events"], "additionalProperties": False}
    process = JsonSchemaGrammar(words, schema, width, [words.eos_token_id]).processor(4)
    tokens, generator = torch.zeros(4, 1, dtype=torch.long, device=device), torch.Generator(device).manual_seed(0)
    start, steps = time.perf_counter(), 64
    for _ in range(steps):
        scores = process(tokens, torch.randn(4, width, generator=generator, device=device))
        tokens = torch.cat([tokens, scores.argmax(1, keepdim=True)], 1)
    seconds = time.perf_counter() - start
    texts = [words.decode(row[1:], skip_special_tokens=True) for row in tokens]
    valid = sum(set(json.loads(text)) == {"events"} for text in texts)
    yield f"valid JSON at width {width:,}", f"{valid} of 4, {1000 * seconds / steps:.1f} ms a token", "4 of 4", valid == 4


def _search(device: str) -> Iterator[Row]:
    from pipeline_steps.retrieve.index.torch_exact import TorchExactIndex

    random = np.random.default_rng(0)
    items, queries = (random.standard_normal((count, 256)).astype(np.float32) for count in (20_000, 200))
    rows, _ = TorchExactIndex(items, device).search(queries, 10)
    expected, _ = TorchExactIndex(items, "cpu").search(queries, 10)
    equal = float((rows == expected).mean())
    yield "exact search, rows equal to the CPU's", f"{equal:.4f}", ">= .999", equal >= 0.999


def _prefetch(scratch: Path, device: str) -> Iterator[Row]:
    """Batches through worker processes, pinned memory and copies that do not block."""
    from tests.factories.checkpoints.stable_diffusion import small_backbone
    from tests.train.small_run import small_datamodule

    folder = small_backbone(scratch / "prefetch")
    loaded = small_datamodule(folder, num_workers=2, prefetch_factor=2, pin_memory=device == "cuda")
    expected, equal = small_datamodule(folder), 0
    for step, batch in zip(range(20), loaded.train_dataloader(), strict=False):
        moved, wanted = batch.to(device), expected.training_batch(step)
        pairs = [(moved.noise, wanted.noise), (moved.latents, wanted.latents), (moved.audio.grids, wanted.audio.grids)]
        equal += all(torch.equal(one.cpu(), other) for one, other in pairs)
    yield "batches on the device equal those computed", f"{equal} of 20", "20 of 20", equal == 20


def _encoders(scratch: Path, device: str, smoke: bool) -> Iterator[Row]:
    """CLAP and AST in bfloat16 against float32 on the CPU."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    from pipeline_steps.models.audio.ast import AstEncoder
    from tests.factories.checkpoints.ast import ast_checkpoint
    from tests.factories.checkpoints.clap import clap_checkpoint, clap_encoder

    random = np.random.default_rng(1)
    clips = [(0.1 * random.standard_normal(480_000)).astype(np.float32) for _ in range(2)]
    folder = scratch / "ast"
    if smoke:
        ast_checkpoint(folder)
    else:
        torch.manual_seed(0)
        ASTModel(ASTConfig()).save_pretrained(folder)
        ASTFeatureExtractor().save_pretrained(folder)
    grids = [
        np.concatenate(AstEncoder(str(folder), device=where, precision=precision).grids(clips)).reshape(-1)
        for where, precision in ((device, "bfloat16"), ("cpu", "float32"))
    ]
    yield _cosine("AST tokens, bfloat16", grids)
    folder = clap_checkpoint(scratch / "clap", full_size=not smoke)
    vectors = []
    for where, dtype in ((device, "bfloat16"), ("cpu", "float32")):
        encoder = clap_encoder(folder, device=where, dtype=dtype).load()
        vectors.append(encoder.audio_rows([encoder.prepare_audio(clip) for clip in clips]).reshape(-1))
    yield _cosine("CLAP vectors, bfloat16", vectors)


def _cosine(what: str, both: list[np.ndarray]) -> Row:
    found = float(both[0] @ both[1] / np.linalg.norm(both[0]) / np.linalg.norm(both[1]))
    return f"{what}: cosine to float32 on the CPU", f"{found:.5f}", ">= .999", found >= 0.999


def _adapter_task(batch: int, smoke: bool) -> Any:
    from benchmarks.gpu_training import sd15

    device = torch.device("cpu" if smoke else "cuda")
    options = argparse.Namespace(reduced=smoke, batch=batch)
    return sd15(options, device, torch.float32 if smoke else torch.bfloat16)


def memory(smoke: bool) -> Iterator[Row]:
    """Peak memory of one adapter step at 512 px, and the microbatches that fit a card of 24 GiB."""
    from pipeline_steps.train.data import AudioImageDataModule, BatchPartition, TrainingBatch
    from pipeline_steps.train.distributed import DistributedSetup
    from pipeline_steps.train.microbatches import find_microbatches

    task = _adapter_task(64, smoke)
    count = len(task.batch)

    class Batches(AudioImageDataModule):
        def training_batch(self, step: int, micro: int = 0) -> TrainingBatch:
            return cast(TrainingBatch, task.batch.select(self.partition.slice_of(count, micro)))

    def step(samples: int) -> float:
        """GiB at the peak; 0 on a CPU."""
        if not smoke:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        batch = task.batch.select(slice(samples)).to("cpu" if smoke else "cuda")
        with torch.autocast(batch.latents.device.type, torch.bfloat16, enabled=not smoke):
            task.loss(batch).backward()
        task.training.zero_grad(set_to_none=True)
        return 0.0 if smoke else torch.cuda.max_memory_allocated() / GIB

    for checkpointing in (True, False):
        task.training.train()
        task.training.unet.train()
        unet = task.training.unet
        (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
        for samples in (1, count) if smoke else (8, 32, 64):
            what = f"peak of a step, {samples} samples{', gradient checkpointing' * checkpointing}"
            try:
                yield what, f"{step(samples):.1f} GiB", "", None
            except torch.OutOfMemoryError:
                yield what, "does not fit", "", None
    setup = DistributedSetup("cpu" if smoke else "gpu", "32-true" if smoke else "bf16-mixed")
    if not smoke:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_GIB * GIB / total))
    found = find_microbatches(task.training, Batches(BatchPartition(), {}), setup, count)
    fits = f"{count} samples in {CARD_GIB} GiB, accumulate_grad_batches auto"
    yield fits, f"{found} microbatches of {-(-count // found)}", ">= 4 samples each", smoke or count // found >= 4


def resume(smoke: bool) -> Iterator[Row]:
    """A training run that is killed and started again ends with the weights of one that is not."""
    with tempfile.TemporaryDirectory() as scratch:
        from tests.factories.checkpoints.stable_diffusion import small_backbone

        backbone = small_backbone(Path(scratch) / "backbone")

        def start(name: str) -> subprocess.Popen[bytes]:
            code = "import sys; from benchmarks.gpu_check import small_training; small_training(*sys.argv[1:])"
            arguments = [str(backbone), f"{scratch}/{name}", "cpu" if smoke else "cuda"]
            return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=sys.stderr)

        whole, killed = start("whole"), start("killed")
        while not (Path(scratch) / "killed/samples/step-000006.png").is_file():  # after the checkpoint of step 4
            if killed.poll() is not None:
                raise RuntimeError(f"the run ended by itself with code {killed.returncode}")
            time.sleep(0.005)
        killed.kill()
        killed.wait()
        again = start("killed")
        codes = whole.wait(), again.wait()
        yield "runs that ended", f"{sum(code == 0 for code in codes)} of 2", "2 of 2", codes == (0, 0)
        one, other = (torch.load(Path(scratch) / name / "weights.pt", weights_only=True) for name in ("whole", "killed"))
        largest = max(float((one[name] - other[name]).abs().max()) for name in one)
        yield "killed at step 6 of 12 and resumed: largest difference of a weight", f"{largest:.1e}", "<= 1e-5", largest <= 1e-5


def small_training(backbone: str, folder: str, device: str) -> None:
    """Twelve steps of a small adapter, in a process of its own."""
    from pipeline_steps.tracking import NoOpTracker
    from pipeline_steps.train.distributed import resolve_setup
    from pipeline_steps.train.recipes.base import TrainingRun
    from pipeline_steps.train.stage import _train
    from pipeline_steps.train.tracking_logger import TrackingLogger
    from tests.train.small_run import small_config, small_datamodule, small_module

    config = small_config(device=device, precision="32-true", performance={"compile": False})
    setup = resolve_setup(config.device, config.precision, config.performance)

    def grid() -> np.ndarray:
        time.sleep(0.3)  # so that the process is killed within the run
        return np.zeros((8, 8, 3), np.uint8)

    run = TrainingRun(small_module(Path(backbone)), small_datamodule(Path(backbone)), grid, lambda _: None)
    _train(config, Path(folder), run, TrackingLogger(NoOpTracker(), "check", 3), setup)
    torch.save(run.module.state_dict(), Path(folder) / "weights.pt")


def training(smoke: bool) -> Iterator[Row]:
    """Adapter training at 512 px against the loop of diffusers' examples."""
    from benchmarks.gpu_training import measure, peak_tflops

    device = torch.device("cpu" if smoke else "cuda")
    peak = None if smoke else peak_tflops(torch.cuda.get_device_name(0))
    options = argparse.Namespace(
        steps=2 if smoke else 10, rounds=1 if smoke else 2, warm=1 if smoke else 3, compile=not smoke, batch=16, reduced=smoke
    )
    result = measure(device, options, peak)
    for name, side in result["sides"].items():
        best = name == ("ours, eager" if smoke else "ours")
        rate = f"{side['images_per_s']:.4g} images/s, {side['ratio_median']:.2f} times plain, peak {side['peak_gib']} GiB"
        yield f"training, {name}", rate, ">= 3 times" if best else "", side["ratio_median"] >= 3 if best else None
        if side["mfu"] is not None and best:
            yield "MFU", f"{side['mfu']:.1%}", ">= 35 % (floor 25 %)", side["mfu"] >= 0.35


def pipeline(smoke: bool) -> Iterator[Row]:
    """CLAP, AST and captions against loops over items."""
    from benchmarks import gpu_pipeline

    for name in ("clap", "ast", "captions"):
        with tempfile.TemporaryDirectory() as scratch:
            rows = gpu_pipeline.PARTS[name](Path(scratch), 1)
        for row in rows:
            best = name == "clap" and row["side"] == "ours"
            rate = f"{row['items_per_second']:.4g} items/s, {row['ratio']:.1f} times plain"
            yield f"{name}, {row['side']}", rate, ">= 10 times" if best else "", row["ratio"] >= 10 if best else None


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "card": card, "correct": correct, "memory": memory, "resume": resume, "training": training, "pipeline": pipeline,
}  # fmt: skip


def add_row(file: Path, part: str, what: str, value: str, bar: str = "", met: bool | None = None) -> None:
    """Append a row, flushed to the disk."""
    with file.open("a") as stream:
        stream.write(json.dumps({"part": part, "what": what, "value": value, "bar": bar, "met": met}) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def run_part(part: str, file: Path, limit: float, smoke: bool) -> None:
    """Run a part in a process group of its own, which is killed at the limit."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--child", part, "--out", str(file.parent), *["--smoke"] * smoke]
    start = time.monotonic()
    with (file.parent / f"{part}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(limit)
            problem = "" if not process.returncode else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"ran past its limit of {limit:.0f} s"
        if process.poll() is None or problem:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    last = ((file.parent / f"{part}.log").read_text(errors="replace").strip().splitlines() or [""])[-1][-160:]
    seconds = f"{time.monotonic() - start:.0f} s"
    if problem:
        add_row(file, part, "failed", f"{problem} after {seconds}: {last}".replace("|", "/"), "", False)
    else:
        add_row(file, part, "time", seconds, f"<= {limit:.0f} s", True)


def table(file: Path) -> str:
    """Markdown table of all rows."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    marks = {True: "yes", False: "**no**", None: ""}
    lines = [f"| {row['part']} | {row['what']} | {row['value']} | {row['bar']} | {marks[row['met']]} |" for row in rows]
    return "\n".join(["| part | what | found | bar | met |", f"|{'---|' * 5}", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--limit-scale", type=float, default=1.0, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = options.out / "rows.jsonl"
    if options.child:
        for what, value, bar, met in PARTS[options.child](options.smoke):
            rated = options.smoke and options.child in ("memory", "training", "pipeline")  # rates of a CPU meet no bar
            add_row(file, options.child, what, value, *(("", None) if rated else (bar, met)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no GPU; repair the driver, or pass --smoke for a reduced run on the CPU")
    start = time.monotonic()
    for part in options.parts:
        limit = LIMITS[part] * options.limit_scale * (4 if options.smoke else 1)
        run_part(part, file, limit, options.smoke)
        print(f"{part}: done after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        (options.out / "table.md").write_text(table(file) + "\n")
    if options.smoke:
        print("REDUCED, on a CPU: rates and memory say nothing about a GPU\n")
    print(table(file))
    failed = [row for row in map(json.loads, file.read_text().splitlines()) if row["what"] == "failed"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
