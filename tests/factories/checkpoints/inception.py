"""Inception-v3 checkpoints of true architecture with random weights: full width, or the same network many times narrower."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch

from pipeline_steps.evaluate.judges.inception import BLOCKS, BRANCHES, STEM

Layers = dict[str, tuple[int, int, int]]
"""Layer -> channels out, kernel height, kernel width."""

STEM_LAYERS: Layers = {
    "Conv2d_1a_3x3": (32, 3, 3), "Conv2d_2a_3x3": (32, 3, 3), "Conv2d_2b_3x3": (64, 3, 3),
    "Conv2d_3b_1x1": (80, 1, 1), "Conv2d_4a_3x3": (192, 3, 3),
}  # fmt: skip
DOUBLE: Layers = {"branch3x3dbl_1": (64, 1, 1), "branch3x3dbl_2": (96, 3, 3), "branch3x3dbl_3": (96, 3, 3)}
SEVENS = {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}


def layers_of(block: str) -> Layers:
    """Layers of a mixed block, as published."""
    kind = BLOCKS[block]
    if kind == "A":
        pool = 32 if block == "Mixed_5b" else 64
        return {
            "branch1x1": (64, 1, 1),
            "branch5x5_1": (48, 1, 1),
            "branch5x5_2": (64, 5, 5),
            **DOUBLE,
            "branch_pool": (pool, 1, 1),
        }
    if kind == "B":
        return {"branch3x3": (384, 3, 3), **DOUBLE}
    if kind == "C":
        c = SEVENS[block]
        return {
            "branch1x1": (192, 1, 1), "branch7x7_1": (c, 1, 1), "branch7x7_2": (c, 1, 7), "branch7x7_3": (192, 7, 1),
            "branch7x7dbl_1": (c, 1, 1), "branch7x7dbl_2": (c, 7, 1), "branch7x7dbl_3": (c, 1, 7), "branch7x7dbl_4": (c, 7, 1),
            "branch7x7dbl_5": (192, 1, 7), "branch_pool": (192, 1, 1),
        }  # fmt: skip
    if kind == "D":
        return {
            "branch3x3_1": (192, 1, 1), "branch3x3_2": (320, 3, 3), "branch7x7x3_1": (192, 1, 1), "branch7x7x3_2": (192, 1, 7),
            "branch7x7x3_3": (192, 7, 1), "branch7x7x3_4": (192, 3, 3),
        }  # fmt: skip
    return {
        "branch1x1": (320, 1, 1), "branch3x3_1": (384, 1, 1), "branch3x3_2a": (384, 1, 3), "branch3x3_2b": (384, 3, 1),
        "branch3x3dbl_1": (448, 1, 1), "branch3x3dbl_2": (384, 3, 3), "branch3x3dbl_3a": (384, 1, 3),
        "branch3x3dbl_3b": (384, 3, 1), "branch_pool": (192, 1, 1),
    }  # fmt: skip


def inception_weights(classes: int, narrower: int = 1) -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names; each one depends on its name alone."""
    weights: dict[str, torch.Tensor] = {}

    def drawn(name: str, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))

    def add(name: str, channels: int, layer: tuple[int, int, int]) -> int:
        out, height, width = max(1, layer[0] // narrower), layer[1], layer[2]
        weights[f"{name}.conv.weight"] = drawn(name, out, channels, height, width) * (1.4 / (channels * height * width) ** 0.5)
        weights[f"{name}.bn.weight"] = 1 + 0.2 * drawn(f"{name} scale", out)
        weights[f"{name}.bn.bias"] = 0.2 * drawn(f"{name} shift", out)
        weights[f"{name}.bn.running_mean"] = 0.2 * drawn(f"{name} mean", out)
        weights[f"{name}.bn.running_var"] = 0.5 + drawn(f"{name} variance", out).abs()
        return out

    channels = 3
    for chain in STEM:
        for layer in chain:
            channels = add(layer, channels, STEM_LAYERS[layer])
    for block, kind in BLOCKS.items():
        layers, outputs = layers_of(block), []
        for chain in BRANCHES[kind]:
            width = channels
            for layer in chain:
                width = add(f"{block}.{layer}", width, layers[layer])
            outputs.append(width)
        channels = sum(outputs) + (channels if kind in "BD" else 0)
    weights["fc.weight"], weights["fc.bias"] = drawn("fc", classes, channels), drawn("fc shift", classes)
    return weights


def inception_checkpoint(folder: Path, classes: int = 1008, narrower: int = 16) -> Path:
    """Write a folder as published ones look: timm's `config.json` and safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(inception_weights(classes, narrower), folder / "model.safetensors")
    settings = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "input_size": [3, 299, 299]}
    config = {"architecture": "inception_v3", "num_classes": classes, "pretrained_cfg": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
