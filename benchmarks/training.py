"""Training recipes side by side at their own budgets: CPU seconds, peak memory, codec error, KID, agreement, drawing speed.

Usage: python -m benchmarks.training [--root .] [--recipes default,codec-tiny,...] [--keep DIR] [--threads 1] [--json FILE]

Each recipe changes some keys of section `train` of the project's params.yaml and is trained in a child process on the
project's own pairs, in a folder of its own with its own memo. Measured on the pairs of split `test`, four drawings a sound:

- kid: squared MMD with the cubic kernel between EfficientNet-Lite0 features of drawn and real test pictures (lower is better);
- win: how often the picture drawn from a pair's sound is nearer to the pair's picture than one drawn from the sound of another
  sound group, in centred cosine of SSD-MobileNet features; 0.5 is chance. The full protocol is in stage `evaluate`;
- s/100: CPU seconds to draw 100 pictures.
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

COMPOSE = {"steps": 1500, "batch_size": 128, "learning_rate": 1e-3}
REFINE = {"steps": 200, "batch_size": 16, "learning_rate": 1e-3}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "codec-linear": {"codec": {"steps": 0}},
    "codec-tiny": {"codec": {"kind": "tiny", "channels": 16, "width": 32, "steps": 500}},
    "composer-only": {"optimiser": {"compose": {**COMPOSE, "steps": 1900}, "refine": {**REFINE, "steps": 0}}},
    "unet-only": {"optimiser": {"compose": {**COMPOSE, "steps": 0}, "refine": {**REFINE, "steps": 1300}}},
    "unet-velocity": {
        "codec": {"channels": 48, "whitening": 0.5},
        "objective": {"prediction": "velocity", "time_mean": 0.0},
        "optimiser": {
            "compose": {**COMPOSE, "steps": 0},
            "refine": {"steps": 480, "batch_size": 48, "learning_rate": 1e-3},
        },
    },
    "mirrored": {"picture": {"mirror": 0.5}},
    "no-sound-views": {"sound": {"views": 1}},
}
SAMPLES = 4


def child(root: str, changes: str, threads: int) -> None:
    """Train one recipe in `root` and print its numbers as the last line."""
    import torch

    torch.set_num_threads(threads)
    from pipeline_steps.core.config import load_params
    from pipeline_steps.train.stage import TrainConfig, run

    layout = ProjectPaths(Path(root))
    section = load_params(layout.params)["train"]
    for key, value in json.loads(changes).items():
        section[key] = {**section[key], **value} if isinstance(value, dict) else value
    config = TrainConfig.model_validate({**section, "threads": threads})
    begin, cpu = time.monotonic(), time.process_time()
    report = run(config, layout)
    numbers = {
        "wall_s": round(time.monotonic() - begin, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "samples": sum(phase.steps * phase.batch_size for phase in (config.optimiser.compose, config.optimiser.refine)),
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
    size = pipeline.defaults.picture_size
    real = [pad_to_square(media.image(row["image_id"]), size) for row in rows]
    tokens = [pipeline.encode_audio(media.sound(row["tracks"][0]["audio_id"])) for row in rows]
    cpu = time.process_time()
    drawn = pipeline.generate_batch(tokens, SAMPLES, seed=0)
    drawing = (time.process_time() - cpu) / (len(rows) * SAMPLES) * 100
    eye = EfficientNetLite0(layout.assets).load()
    kid = np.mean([cubic_mmd(eye.features(real), eye.features(list(drawn[:, sample]))) for sample in range(SAMPLES)])
    judge = SsdMobileNetV2(layout.assets).load()
    asked = judge.features(real)
    answers = [judge.features(list(drawn[:, sample])) for sample in range(SAMPLES)]
    groups = [row["audio_group"] for row in rows]
    return {
        "kid": round(float(kid), 4),
        "win": round(float(np.mean([win_rate(asked, answer, groups) for answer in answers])), 4),
        "draw_s_per_100": round(drawing, 2),
    }


def cubic_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401)."""
    n, m = len(x), len(y)
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    return float((xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1)) - 2 * xy.mean())


def win_rate(real: np.ndarray, drawn: np.ndarray, groups: list[str]) -> float:
    """Mean over pairs i of the share of other-group j for which drawn i is more like real i than drawn j is."""
    x, y = real - real.mean(0), drawn - drawn.mean(0)
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
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--keep", type=Path, help="keep each recipe's project below this folder")
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
        "codec_psnr_val_db",
        "loss",
        "validation_loss",
        "kid",
        "win",
        "draw_s_per_100",
    )
    print("| recipe | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.recipes.split(","):
            folder = (arguments.keep or Path(scratch)) / name
            project_copy(arguments.root, folder)
            command = [
                sys.executable,
                __file__,
                "--threads",
                str(arguments.threads),
                "--child",
                str(folder),
                json.dumps(RECIPES[name]),
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
