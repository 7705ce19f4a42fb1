"""Price of smaller stored features: validation loss of the demo's adapter with pooled audio tokens and with mean latents.

Usage: python -m benchmarks.stored_features [--pool-time 1 2 4 8] [--seeds 0 1 2] [--steps 200]

Reads the pairs and the result cache of a finished demo; tokens are pooled after they are read. Every row trains the adapter as
stage `train` does. Losses of a seed use the same noise, so that rows are compared seed by seed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline_steps.audio.mixing import Tracks
from pipeline_steps.core.config import load_params
from pipeline_steps.core.feature_store import FeatureStore
from pipeline_steps.core.media_shards import MediaShardReader
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.audio_tokens import AudioTokens, TokenPooling
from pipeline_steps.tracking import NoOpTracker
from pipeline_steps.train.audio_feature_cache import (
    TOKEN_COLUMNS,
    StoredClips,
    build_tokenizer,
    cache_fingerprint,
    load_or_encode_clips,
)
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.distributed import resolve_setup
from pipeline_steps.train.recipes.base import TrainingInputs
from pipeline_steps.train.stage import _train, build_recipe, read_pairs
from pipeline_steps.train.tracking_logger import TrackingLogger


class PooledClips:
    """Pooled tokens of stored clips, in memory."""

    def __init__(self, clips: StoredClips, pooling: TokenPooling) -> None:
        self.clips, self.pooling = clips, pooling

    def select(self, clips: Iterable[Tracks]) -> list[list[AudioTokens]]:
        """Tokens of some clips by position."""
        return [[replace(tokens, grid=self.pooling(tokens.grid)) for tokens in self.clips[tracks]] for tracks in clips]


def losses(params: dict[str, Any], seed: int, pool_time: int, sample: bool, steps: int) -> tuple[float, float, float]:
    """Validation loss before and after training, and kB of the tokens of a clip of 10 s."""
    layout = ProjectPaths(Path.cwd())
    section = {**params, "validation_steps": steps, "checkpointing_steps": steps}
    section["ip_adapter"] = {**params["ip_adapter"], "sample_latents": sample}
    section["ip_adapter"]["phases"]["adapter"]["max_steps"] = steps
    config = TrainConfig.from_params(section)
    setup = resolve_setup(config.device, config.precision, config.performance)
    encoder = build_tokenizer(config.audio, layout.assets, layout.root, setup.device.type)

    def open_store(mark: str, columns: Any) -> FeatureStore:
        return FeatureStore(layout.result_cache / "train" / mark, columns)

    pairs, media = read_pairs(layout), MediaShardReader(layout.media)
    rows = [row for split in pairs.values() for row in split]
    store = open_store(cache_fingerprint(config.audio, config.seed, encoder), TOKEN_COLUMNS)
    clips, _, _ = load_or_encode_clips(config.audio, config.seed, encoder, store, media.sound, rows)
    pooled: Any = PooledClips(clips, TokenPooling(pool_time))
    config = config.model_copy(update={"seed": seed})  # the augmentations stay those of the cache
    inputs = TrainingInputs("stored-features", pairs, pooled, encoder, media.image, open_store)
    prepared = build_recipe(config, layout, setup).prepare(inputs)
    prepared = replace(prepared, sample_grid=lambda: np.zeros((2, 2, 3), np.uint8))
    module, batch = prepared.module, prepared.datamodule.validation_batch()
    assert batch is not None
    with torch.inference_mode():
        before = float(module.eval().per_sample_loss(batch).mean())
    with tempfile.TemporaryDirectory() as folder:
        _train(config, Path(folder), prepared, TrackingLogger(NoOpTracker(), module.objective, steps), setup)
    kilobytes = -(-62 // pool_time) * encoder.bands * encoder.width * 2 / 1000
    return before, module.validation[str(steps)], kilobytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool-time", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    params = load_params(Path("params.yaml"))["train"]
    params["num_threads"] = options.threads
    rows = [(pool, True) for pool in options.pool_time] + [(1, False)]
    reference: dict[int, float] = {}
    print("| tokens pooled | latents | kB, clip of 10 s | validation loss by seed | gain lost | before training |")
    print(f"|{'---|' * 6}", flush=True)
    for pool, sample in rows:
        found = [losses(params, seed, pool, sample, options.steps) for seed in options.seeds]
        lost = []
        for seed, (before, after, _) in zip(options.seeds, found, strict=True):
            reference.setdefault(seed, after)
            lost.append((after - reference[seed]) / (before - reference[seed]))
        first, last = (", ".join(f"{values[place]:.5f}" for values in found) for place in (0, 1))
        kind = "sampled" if sample else "mean"
        spread = f"{100 * float(np.mean(lost)):.1f} % ({100 * min(lost):.1f} to {100 * max(lost):.1f})"
        print(f"| {pool} | {kind} | {found[0][2]:.0f} | {last} | {spread} | {first} |", flush=True)


if __name__ == "__main__":
    main()
