"""Small training runs: configuration, batches and callbacks that the tests of the stage share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.diffusion.audio_conditioner import ConditionerInput
from pipeline_steps.diffusion.autoencoder import PatchPCAAutoencoder
from pipeline_steps.train.callbacks import EMA_EVERY_N_STEPS
from pipeline_steps.train.config import TrainConfig
from pipeline_steps.train.config_groups import ImageAugmentationConfig, OptimizerConfig
from pipeline_steps.train.data import BatchPartition
from pipeline_steps.train.recipes.scratch.config import ObjectiveConfig, ScratchConfig, ScratchPhases
from pipeline_steps.train.recipes.scratch.data import ScratchDataModule, ScratchDataset
from pipeline_steps.train.recipes.scratch.lightning_module import ScratchModule
from pipeline_steps.train.recipes.scratch.training import build_conditioner, build_denoiser

SMALL: dict[str, Any] = {
    "num_threads": 1,
    "device": "cpu",
    "resolution": 32,
    "audio": {"max_seconds": 2.0, "num_augmentations": 2},
    "optimizer": {"lr_warmup_steps": 2, "ema_decay": 0.8},
    "sampling": {"num_inference_steps": 2},
    "checkpointing_steps": 4,
    "validation_steps": 3,
    "scratch": {
        "autoencoder": {"latent_channels": 8, "hidden_channels": 8, "max_steps": 4},
        "conditioner": {"num_time_tokens": 2, "frame_pca_dim": 8, "tag_pca_dim": 8, "hidden_dim": 32},
        "unet": {"block_out_channels": [32, 32], "attention_head_dim": 16},
        "objective": {"full_covariance_channels": 4},
        "mlp_denoiser": {"hidden_dim": 32, "num_blocks": 1},
        "phases": {
            "mlp": {"max_steps": 5, "batch_size": 4, "learning_rate": 1e-3},
            "unet": {"max_steps": 7, "batch_size": 3, "learning_rate": 1e-3},
        },
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


def phase_steps(mlp: int, unet: int) -> dict[str, Any]:
    """Keys of `train.scratch` for so many steps per phase."""
    return {"phases": {"mlp": {"max_steps": mlp}, "unet": {"max_steps": unet}}}


def model_bytes(layout: ProjectPaths) -> dict[str, bytes]:
    """Every file of the exported model."""
    return {
        str(path.relative_to(layout.model)): path.read_bytes() for path in sorted(layout.model.rglob("*")) if path.is_file()
    }


def scratch_datamodule(
    partition: BatchPartition = BatchPartition(),  # noqa: B008 - frozen
    augmentation: ImageAugmentationConfig = ImageAugmentationConfig(),  # noqa: B008 - frozen
    **loader_arguments: Any,
) -> ScratchDataModule:
    """Five random pairs with two clips; three steps of the first phase, then nine of the second."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 16, 16, generator=generator) * 2 - 1
    autoencoder = PatchPCAAutoencoder(4, 0.5, 0)
    autoencoder.fit(images)
    inputs = [
        ConditionerInput(torch.randn(3, 2, 4, generator=generator), torch.randn(3, 10, generator=generator)) for _ in range(2)
    ]
    data = ScratchDataset(images, [0, 1, 0, 1, 0], inputs)
    phases = ScratchPhases.model_validate(
        {
            "mlp": {"max_steps": 3, "batch_size": 3, "learning_rate": 1e-3},
            "unet": {"max_steps": 9, "batch_size": 2, "learning_rate": 1e-3},
        }
    )
    return ScratchDataModule(data, data, autoencoder, augmentation, ObjectiveConfig(), phases, 1, partition, loader_arguments)


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


def tiny_module() -> ScratchModule:
    """Module of a few thousand weights, the same every time; four steps of the first phase, then eight of the second."""
    config = ScratchConfig.model_validate(
        merged(
            SMALL["scratch"],
            {
                "autoencoder": {"latent_channels": 4},
                "objective": {"full_covariance_channels": 2},
                "conditioner": {"frame_pca_dim": 4, "tag_pca_dim": 4},
                **phase_steps(4, 8),
            },
        )
    )
    torch.manual_seed(0)
    denoiser = build_denoiser(config, 16, build_conditioner(config.conditioner))
    optimizer = OptimizerConfig(lr_warmup_steps=2)
    return ScratchModule(denoiser, config.phases, digest="digest", optimizer=optimizer, seed=0, max_nonfinite_steps=3)
