"""Memory and time of training against the number of pairs: synthetic features, the real data path, adapter and optimizer.

Usage: python -m benchmarks.training_memory --scratch DIR [--pairs 10000 100000] [--tokens 12] [--steps 30]

Each number of pairs has a process of its own. It reads a pair table, finds the rows of all clips and images in feature stores
of random values, and trains the adapter of the demo's backbone. Reported: private memory (what grows with each process), mapped
files (pages that processes share and the kernel may drop), the peak of both, and seconds of a step after the first ten.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline_steps.core.feature_store import FeatureStore
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.host_memory import release_unused_memory
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import PAIRS
from pipeline_steps.core.tables import write_table
from pipeline_steps.diffusion.audio_tokens import TAGS, AudioTokens
from pipeline_steps.train.audio_feature_cache import (
    TOKEN_COLUMNS,
    build_tokenizer,
    distinct_clips,
    load_or_encode_clips,
    mix_partner,
    tokens_to_row,
)
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.distributed import DistributedSetup
from pipeline_steps.train.recipes.base import TrainingInputs
from pipeline_steps.train.recipes.ip_adapter.data import LATENT_COLUMNS
from pipeline_steps.train.stage import build_recipe, read_pairs

WIDTH = 1024
"""Width of YAMNet's tokens."""
LATENT = (12, 8, 8)
"""Latents of 64 px in the demo's backbone."""
PART = 2_000
"""Rows of a part."""
WARM_UP = 10


def item(kind: str, number: int) -> str:
    """Id of an item: 32 hex digits."""
    return f"{number:08x}{kind:0>24}"


def write_pairs(layout: ProjectPaths, pairs: int) -> None:
    """Pair table: a clip and an image of its own for each pair."""
    columns: dict[str, Any] = {
        field.name: pa.array([""] * pairs if pa.types.is_string(field.type) else np.zeros(pairs), field.type)
        for field in PAIRS.schema
        if field.name != "tracks"
    }
    columns["pair_id"] = [item("c", number) for number in range(pairs)]
    columns["image_id"] = [item("a", number) for number in range(pairs)]
    columns["split"] = ["val" if number < 32 else "train" for number in range(pairs)]
    columns["tracks"] = [[{"audio_id": item("b", number), "phrase": "a sound", "gain_db": 0.0}] for number in range(pairs)]
    arrays = [pa.array(columns[field.name], field.type) for field in PAIRS.schema]
    write_table(layout.pairs / "pairs.parquet", PAIRS, pa.table(arrays, schema=PAIRS.schema))


def clip_keys(clips: Sequence[Any], pool: list[Any], augmentations: int) -> Iterator[str]:
    """Keys of the augmentations of clips, as the stage makes them."""
    for tracks in clips:
        for number in range(augmentations):
            yield fingerprint([tracks, number, mix_partner(tracks, number, pool)])


def write_features(folder: Path, keys: Sequence[str], images: Sequence[str], tokens: int) -> None:
    """Feature stores of random values: as many distinct ones as a part has rows."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.rand(PART, tokens, 1, WIDTH, generator=generator).half()
    tags = torch.rand(PART, TAGS, generator=generator)
    clips = [tokens_to_row(AudioTokens(grid, tag, -20.0)) for grid, tag in zip(grids, tags, strict=True)]
    latents = torch.rand(PART, 2, *LATENT, generator=generator).half().numpy()
    pictures = [{"mean": mean.tobytes(), "std": std.tobytes()} for mean, std in latents]
    for name, columns, names, rows in (("clips", TOKEN_COLUMNS, keys, clips), ("images", LATENT_COLUMNS, images, pictures)):
        store = FeatureStore(folder / name, columns)
        for start in range(0, len(names), PART):
            store.append(dict(zip(names[start : start + PART], rows, strict=False)))


def memory_mb() -> dict[str, float]:
    """Private memory, mapped files and peak of this process in MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    fields = {line[0].rstrip(":"): int(line[1]) / 1000 for line in lines if line[0] in {"RssAnon:", "RssFile:", "VmHWM:"}}
    return {"private_mb": fields["RssAnon"], "mapped_mb": fields["RssFile"], "peak_mb": fields["VmHWM"]}


def train(folder: Path, backbone: Path, steps: int, augmentations: int) -> dict[str, float]:
    """Prepare the recipe as the stage does, and train; memory before the data and after training."""
    section = {"audio": {"num_augmentations": augmentations}, "ip_adapter": {"backbone": {"model": str(backbone)}}}
    config, layout = TrainConfig.from_params(section), ProjectPaths(folder)
    setup = DistributedSetup("cpu", "32-true")
    recipe: Any = build_recipe(config, layout, setup)
    tokenizer = build_tokenizer(config.audio, layout.assets, folder, "cpu")
    recipe.backbone.load()
    before = memory_mb()["private_mb"]

    def nothing(item_id: str) -> Any:
        raise AssertionError(f"{item_id} is stored")

    def open_store(_mark: str, columns: Sequence[str]) -> FeatureStore:
        return FeatureStore(folder / ("clips" if columns == TOKEN_COLUMNS else "images"), columns)

    start = time.perf_counter()
    pairs = read_pairs(layout)
    rows = [row for split in pairs for row in pairs[split]]
    store = open_store("", TOKEN_COLUMNS)
    features, _, _ = load_or_encode_clips(config.audio, config.seed, tokenizer, store, nothing, rows)
    prepared = recipe.prepare(TrainingInputs("digest", pairs, features, tokenizer, nothing, open_store))
    del pairs, rows, features
    release_unused_memory()
    loaded, held = time.perf_counter() - start, memory_mb()["private_mb"]
    module = prepared.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-5, fused=True)
    seconds, fetching = [], []
    for step in range(steps):
        start = time.process_time()
        batch = prepared.datamodule.training_batch(step)
        fetching.append(time.process_time() - start)
        module.per_sample_loss(batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - start)
    found = memory_mb() | {"model_mb": before, "loaded_mb": held, "load_s": loaded}
    return found | {"step_s": float(np.median(seconds[WARM_UP:])), "batch_s": float(np.median(fetching[WARM_UP:]))}


def measure(scratch: Path, backbone: Path, pairs: int, tokens: int, steps: int, augmentations: int) -> dict[str, float]:
    """Figures of one number of pairs, in a new process; its files are kept for a second run."""
    folder = scratch / f"{pairs}-{tokens}-{augmentations}"
    if not (folder / "done").exists():
        layout = ProjectPaths(folder)
        write_pairs(layout, pairs)
        rows = read_pairs(layout)
        clips = distinct_clips([*rows["train"], *rows["val"]])
        keys = list(clip_keys(clips, distinct_clips(rows["train"]), augmentations))
        write_features(folder, keys, [item("a", number) for number in range(pairs)], tokens)
        (folder / "done").touch()
    code = f"""
import json, sys
from pathlib import Path
from benchmarks.training_memory import train
print("RESULT " + json.dumps(train(Path({str(folder)!r}), Path({str(backbone)!r}), {steps}, {augmentations})))
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.rsplit("RESULT ", 1)[1])
    for name in ("clips", "images"):
        stored = sum(path.stat().st_size for path in (folder / name).iterdir())
        result[f"{name}_kb"] = stored / pairs / 1000
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--tokens", type=int, default=12, help="tokens of a clip; 12 are 2 s, 62 are 10 s")
    parser.add_argument("--augmentations", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--backbone", type=Path, default=Path("data/assets/backbone"))
    options = parser.parse_args()
    print("| pairs | private MB | before data MB | mapped MB | peak MB | load s | step s | batch s | kB a clip | kB image |")
    print(f"|{'---|' * 10}")
    for pairs in options.pairs:
        found = measure(
            options.scratch.resolve(), options.backbone.resolve(), pairs, options.tokens, options.steps, options.augmentations
        )
        cells = [f"{found[name]:.0f}" for name in ("private_mb", "model_mb", "mapped_mb", "peak_mb")]
        cells += [f"{found['load_s']:.0f}", *(f"{found[name]:.3f}" for name in ("step_s", "batch_s"))]
        cells += [f"{found[name]:.1f}" for name in ("clips_kb", "images_kb")]
        print(f"| {pairs:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
