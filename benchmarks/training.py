"""Variants of recipe `ip_adapter`: CPU time, memory, KID, win rate, sampling speed.

Usage: python -m benchmarks.training [--root .] [--variants default,no-prompt,...] [--keep DIR] ...

Each variant changes some keys of section `train` of the project's params.yaml. It is trained in a child process on the
project's pairs, in its own folder with its own cache. Measured on the pairs of split `test`, four images per clip:

- kid: squared MMD with the cubic kernel between EfficientNet-Lite0 features of generated and real images (lower is better);
- win: how often the image generated from a pair's clip is nearer to the pair's image than one generated from a clip of another
  audio group, in centered cosine of SSD-MobileNet features; 0.5 is chance. The full protocol is in stage `evaluate`;
- sample_s_per_100: CPU seconds to generate 100 images.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import PAIRS
from pipeline_steps.core.tables import read_table

PROJECT = Path(__file__).resolve().parents[1]

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one-step": {"phases.adapter.max_steps": 1},
    "no-prompt": {"backbone.prompt": ""},
    "no-dropout": {"resampler.dropout": 0.0},
    "larger-resampler": {"resampler.num_queries": 16, "resampler.dim": 512, "resampler.depth": 4, "resampler.heads": 8},
    "more-guidance": {"sampling.guidance_scale": 6.0},
    "mirrored": {"image_augmentation.hflip_prob": 0.5},
    "no-audio-augmentation": {"audio.num_augmentations": 1},
}
"""Keys of group `train.ip_adapter` or of section `train`, and their values."""
SAMPLES = 4


def child(root: str, changes: str, threads: int) -> None:
    """Train one variant in `root` and print its numbers as the last line."""
    import torch

    torch.set_num_threads(threads)
    from pipeline_steps.core.config import load_params
    from pipeline_steps.train.stage import TrainConfig, run

    layout = ProjectPaths(Path(root))
    section = load_params(layout.params)["train"]
    for key, value in json.loads(changes).items():
        *groups, name = key.split(".")
        node = section["ip_adapter"] if groups[0] in section["ip_adapter"] else section
        for group in groups:
            node = node[group]
        node[name] = value
    config = TrainConfig.from_params({**section, "num_threads": threads})
    begin, cpu = time.monotonic(), time.process_time()
    report = run(config, layout)
    numbers = {
        "wall_s": round(time.monotonic() - begin, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "samples": config.recipe_config.phase.max_steps * config.recipe_config.phase.batch_size,
        **report.metrics,
        **measure(layout),
    }
    print("RESULT " + json.dumps(numbers), flush=True)


def measure(layout: ProjectPaths) -> dict[str, float]:
    """Distances and agreement on the test pairs."""
    from pipeline_steps.diffusion.image_processor import pad_to_square
    from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
    from pipeline_steps.models.vision.efficientnet_lite import EfficientNetLite0
    from pipeline_steps.models.vision.ssd_mobilenet_v2 import SsdMobileNetV2

    rows = [row for row in read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist() if row["split"] == "test"]
    media = MediaShardReader(layout.media)
    pipeline = AutoAudio2ImagePipeline.from_pretrained(layout.model)
    size = pipeline.generation_config.resolution
    real = [pad_to_square(media.image(row["image_id"]), size) for row in rows]
    embeds = [pipeline.encode_audio(media.sound(row["tracks"][0]["audio_id"])) for row in rows]
    cpu = time.process_time()
    generated = pipeline.generate_batch(embeds, SAMPLES, seed=0)
    sampling = (time.process_time() - cpu) / (len(rows) * SAMPLES) * 100
    encoder = EfficientNetLite0(layout.assets).load()
    kid = np.mean(
        [cubic_mmd(encoder.features(real), encoder.features(list(generated[:, sample]))) for sample in range(SAMPLES)]
    )
    judge = SsdMobileNetV2(layout.assets).load()
    real_features = judge.features(real)
    answers = [judge.features(list(generated[:, sample])) for sample in range(SAMPLES)]
    groups = [row["audio_group"] for row in rows]
    return {
        "kid": round(float(kid), 4),
        "win": round(float(np.mean([win_rate(real_features, answer, groups) for answer in answers])), 4),
        "sample_s_per_100": round(sampling, 2),
    }


def cubic_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401)."""
    n, m = len(x), len(y)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return float((xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean())


def win_rate(real: np.ndarray, generated: np.ndarray, groups: list[str]) -> float:
    """Mean over pairs i of the fraction of other-group j for which generated i is closer to real i than generated j."""
    x, y = real - real.mean(0), generated - generated.mean(0)
    scores = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (y / np.linalg.norm(y, axis=1, keepdims=True)).T
    wins = []
    for i, group in enumerate(groups):
        others = [j for j, other in enumerate(groups) if other != group]
        wins.append(float(np.mean(scores[i, i] > scores[i, others])))
    return float(np.mean(wins))


def project_copy(root: Path, folder: Path) -> None:
    """Links to the inputs of stage train, and the parameters."""
    (folder / "data").mkdir(parents=True)
    for name in ("assets", "catalog", "media", "pairs"):
        (folder / "data" / name).symlink_to((root / "data" / name).resolve())
    (folder / "params.yaml").write_bytes((root / "params.yaml").read_bytes())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=PROJECT)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--keep", type=Path, help="keep each variant's project below this folder")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("ROOT", "CHANGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child, arguments.threads)
        return
    results: dict[str, Any] = {}
    columns = (
        "cpu_s",
        "wall_s",
        "peak_mb",
        "samples",
        "loss",
        "validation_loss",
        "kid",
        "win",
        "sample_s_per_100",
    )
    print("| variant | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.variants.split(","):
            folder = (arguments.keep or Path(scratch)) / name
            project_copy(arguments.root, folder)
            command = [
                sys.executable,
                __file__,
                "--threads",
                str(arguments.threads),
                "--child",
                str(folder),
                json.dumps(VARIANTS[name]),
            ]
            output = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "SONIFY_TRACKING": "off"}
            ).stdout
            results[name] = json.loads(output.rsplit("RESULT ", 1)[1])
            print(f"| {name} | " + " | ".join(str(results[name].get(column, "")) for column in columns) + " |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
