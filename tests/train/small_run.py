"""Small training runs: configuration, batches and callbacks for the tests of the stage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.audio_prompt import AudioPrompt
from pipeline_steps.diffusion.audio_tokens import TAGS, AudioTokens
from pipeline_steps.diffusion.ip_adapter import AudioIPAdapter
from pipeline_steps.diffusion.perceiver_resampler import PerceiverResampler
from pipeline_steps.diffusion.stable_diffusion import StableDiffusionBackbone
from pipeline_steps.train.callbacks import EMA_EVERY_N_STEPS
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.config_groups import OptimizerConfig
from pipeline_steps.train.data import BatchPartition
from pipeline_steps.train.recipes.ip_adapter.config import IPAdapterConfig
from pipeline_steps.train.recipes.ip_adapter.data import IPAdapterDataModule, IPAdapterDataset
from pipeline_steps.train.recipes.ip_adapter.lightning_module import AudioIPAdapterModule

SMALL: dict[str, Any] = {
    "num_threads": 1,
    "device": "cpu",
    "resolution": 32,
    "audio": {"max_seconds": 2.0, "num_augmentations": 2},
    "optimizer": {"lr_warmup_steps": 2, "ema_decay": 0.8},
    "sampling": {"num_inference_steps": 2},
    "checkpointing_steps": 4,
    "validation_steps": 3,
    "ip_adapter": {
        "backbone": {"model": "backbone"},
        "resampler": {"num_queries": 2, "dim": 16, "depth": 1, "heads": 2, "dropout": 0.1},
        "phases": {"adapter": {"max_steps": 12, "batch_size": 3, "learning_rate": 1e-3}},
    },
}


def merged(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Section with some keys changed; groups are merged."""
    result = copy.deepcopy(section)
    for key, value in changes.items():
        result[key] = merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


def small_section(**changes: Any) -> dict[str, Any]:
    """Section of a small run with some keys changed."""
    return merged(SMALL, changes)


def small_config(**changes: Any) -> TrainConfig:
    """Configuration of a small run with some keys changed."""
    return TrainConfig.from_params(small_section(**changes))


def adapter_phase(max_steps: int, batch_size: int = 3, learning_rate: float = 1e-3) -> dict[str, Any]:
    """Key `train.ip_adapter` with another phase."""
    return {"phases": {"adapter": {"max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate}}}


def model_bytes(layout: ProjectPaths) -> dict[str, bytes]:
    """Every file of the exported model."""
    return {
        str(path.relative_to(layout.model)): path.read_bytes() for path in sorted(layout.model.rglob("*")) if path.is_file()
    }


def small_adapter(backbone: Path) -> AudioIPAdapter:
    """Untrained adapter for clips of tokens [time, 1, 8] in a backbone of its own, the same every time."""
    frozen = StableDiffusionBackbone(str(backbone)).load()
    torch.manual_seed(0)
    resampler = PerceiverResampler(8, 1, num_queries=2, output_width=frozen.width, dim=16, depth=1, heads=2, dropout=0.1)
    return AudioIPAdapter(frozen, resampler, AudioPrompt())


def small_datamodule(
    backbone: Path,
    partition: BatchPartition = BatchPartition(),  # noqa: B008 - frozen
    hflip_prob: float = 0.0,
    **loader_arguments: Any,
) -> IPAdapterDataModule:
    """Batches of three out of five random pairs with two clips of unequal length."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 2, 4, 4, 4, generator=generator).half()
    stds = torch.rand(means.shape, generator=generator).half()
    tokens = [
        [
            AudioTokens(torch.randn(length, 1, 8, generator=generator).half(), torch.rand(TAGS, generator=generator), -20.0)
            for _ in range(3)
        ]
        for length in (3, 5)
    ]
    data = IPAdapterDataset(means, stds, list(range(5)), [0, 1, 0, 1, 0], tokens)
    config = IPAdapterConfig.model_validate(adapter_phase(12))
    return IPAdapterDataModule(data, data, small_adapter(backbone), config, hflip_prob, 1, partition, loader_arguments)


class EMARecorder(Callback):
    """Computes the moving average by hand from the live weights."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not batch.last or (trainer.global_step - 1) % EMA_EVERY_N_STEPS:
            return
        weight = self.decay**EMA_EVERY_N_STEPS
        for name, value in pl_module.named_parameters():
            live = value.detach().clone()
            self.average[name] = weight * self.average.get(name, live) + (1 - weight) * live


def small_module(backbone: Path) -> AudioIPAdapterModule:
    """Module of a few thousand weights, the same every time; twelve steps."""
    return AudioIPAdapterModule(
        small_adapter(backbone),
        snr_gamma=5.0,
        digest="digest",
        phase=IPAdapterConfig.model_validate(adapter_phase(12)).phase,
        optimizer=OptimizerConfig(lr_warmup_steps=2),
        seed=0,
        max_nonfinite_steps=3,
    )
