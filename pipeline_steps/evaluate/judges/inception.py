"""Judges `inception` and `inception_v3`: pooled features of Inception-v3 (Szegedy et al. 2016, arXiv 1512.00567).

Two networks go by that name. FID, and the KID of papers, are defined on the first one alone:

- `inception`: Google's graph of 2015-12-05 with 1008 classes, as pytorch-fid and torch-fidelity carry it. Its average pools
  leave the border out and its last pool takes the maximum.
- `inception_v3`: the ImageNet network with 1000 classes, as torchvision and timm carry it.

Both are read under the weight names of torchvision, which all four packages use. Widths are those of the weights.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.evaluate.judges.hub_vision_model import HubImageFeatureExtractor

SIDE = 299
SMALLEST = 75
"""px; a smaller picture would be gone before the last block."""
EPSILON = 1e-3
ARCHITECTURE = "inception_v3"

Chain = tuple[str, ...]
STEM: tuple[Chain, ...] = (("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"), ("Conv2d_3b_1x1", "Conv2d_4a_3x3"))
"""After each of these chains comes a maximum pool."""
THREES = tuple(f"branch3x3dbl_{step}" for step in range(1, 4))
SEVENS = tuple(f"branch7x7dbl_{step}" for step in range(1, 6))
BRANCHES: dict[str, tuple[Chain, ...]] = {
    "A": (("branch1x1",), ("branch5x5_1", "branch5x5_2"), THREES, ("branch_pool",)),
    "B": (("branch3x3",), THREES),
    "C": (("branch1x1",), ("branch7x7_1", "branch7x7_2", "branch7x7_3"), SEVENS, ("branch_pool",)),
    "D": (("branch3x3_1", "branch3x3_2"), ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4")),
    "E": (
        ("branch1x1",), ("branch3x3_1", "branch3x3_2a"), ("branch3x3_1", "branch3x3_2b"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a"), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3b"),
        ("branch_pool",),
    ),
}  # fmt: skip
"""Branches of each kind of block, in the order in which their outputs stand side by side."""
BLOCKS = {
    "Mixed_5b": "A", "Mixed_5c": "A", "Mixed_5d": "A", "Mixed_6a": "B", "Mixed_6b": "C", "Mixed_6c": "C", "Mixed_6d": "C",
    "Mixed_6e": "C", "Mixed_7a": "D", "Mixed_7b": "E", "Mixed_7c": "E",
}  # fmt: skip
HALVING = {
    "Conv2d_1a_3x3",
    *(f"Mixed_6a.{chain[-1]}" for chain in BRANCHES["B"]),
    *(f"Mixed_7a.{chain[-1]}" for chain in BRANCHES["D"]),
}
BARE = {*HALVING, "Conv2d_2a_3x3", "Conv2d_4a_3x3"}
"""Convolutions without padding; all others keep the size."""


def layer_names() -> list[str]:
    """Every convolution with its batch norm."""
    mixed = (f"{block}.{layer}" for block, kind in BLOCKS.items() for chain in BRANCHES[kind] for layer in chain)
    return list(dict.fromkeys([*(layer for chain in STEM for layer in chain), *mixed]))


def pooled_features(pixels: torch.Tensor, weights: dict[str, torch.Tensor], of_2015: bool) -> torch.Tensor:
    """[N, 2048] of normalised pictures [N, 3, H, W], H and W at least `SMALLEST`.

    Args:
        weights: by torchvision's names.
        of_2015: the network of FID, whose pools differ.
    """

    def convolution(hidden: torch.Tensor, name: str) -> torch.Tensor:
        kernel = weights[f"{name}.conv.weight"]
        padding = (0, 0) if name in BARE else (kernel.shape[2] // 2, kernel.shape[3] // 2)
        hidden = F.conv2d(hidden, kernel, stride=2 if name in HALVING else 1, padding=padding)
        mean, variance, scale, shift = (
            weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(hidden, mean, variance, scale, shift, eps=EPSILON))

    hidden = pixels
    for chain in STEM:
        for layer in chain:
            hidden = convolution(hidden, layer)
        hidden = F.max_pool2d(hidden, 3, 2)
    for block, kind in BLOCKS.items():
        outputs = []
        for chain in BRANCHES[kind]:
            branch = hidden
            if chain == ("branch_pool",):
                highest = of_2015 and block == "Mixed_7c"
                branch = (
                    F.max_pool2d(hidden, 3, 1, 1) if highest else F.avg_pool2d(hidden, 3, 1, 1, count_include_pad=not of_2015)
                )
            for layer in chain:
                branch = convolution(branch, f"{block}.{layer}")
            outputs.append(branch)
        if kind in "BD":
            outputs.append(F.max_pool2d(hidden, 3, 2))
        hidden = torch.cat(outputs, 1)
    return hidden.mean((2, 3))


def resize_clean_fid(image: ByteArray, side: int = SIDE) -> FloatArray:
    """RGB uint8 [H, W, 3] -> float32 [side, side, 3], each channel bicubic with antialiasing and never rounded in between.

    The resize of clean-fid (Parmar et al. 2022, arXiv 2104.11222); pytorch-fid's bilinear one without antialiasing gives other
    numbers.
    """
    channels = [Image.fromarray(image[..., channel].astype(np.float32)) for channel in range(3)]
    return np.stack([np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels], axis=-1)


class FIDInceptionV3(HubImageFeatureExtractor):
    """The network of FID: pictures -> 2048 pooled numbers. Refuses weights of any other Inception.

    A checkpoint is a folder or hub id with `config.json` (`architecture: inception_v3`, `num_classes`) and safetensors;
    `python -m pipeline_steps.evaluate.judges.convert_inception` makes such a folder of a published .pth file.
    """

    name = "inception"
    family = "inception"
    version = 1
    classes: ClassVar[int] = 1008
    mean: tuple[float, ...] = (128.0, 128.0, 128.0)
    deviation: tuple[float, ...] = (128.0, 128.0, 128.0)
    """Of bytes, as in the graph of 2015: (x - 128) / 128."""

    def load(self) -> Self:
        """Load and check the weights; calling it again does nothing.

        Raises:
            ConfigError: an Inception of another number of classes.
            IntegrityError: weights are missing, damaged, or do not fit each other.
        """
        if self._network is None:
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            folder = self.fetch()
            weights: dict[str, torch.Tensor] = {}
            try:
                for path in sorted(folder.glob("*.safetensors")):
                    weights |= load_file(path)
            except (OSError, SafetensorError) as error:
                reason = f"{self.key}.model: the weights cannot be read: {' '.join(str(error).split())[:200]}"
                raise IntegrityError(reason, "fetch the checkpoint again") from error
            check_weights(weights, self.classes, f"{self.key}.model")
            self._network = {name: tensor.float().to(self.device) for name, tensor in weights.items()}
        return self

    def _check(self, config: dict[str, Any]) -> None:
        kind, classes = config.get("architecture"), config.get("num_classes")
        if kind != ARCHITECTURE or classes != self.classes:
            raise ConfigError(
                f"{self.key}.model: {self.model} is {kind or config.get('model_type')} with {classes} classes, "
                f"not {ARCHITECTURE} with {self.classes}",
                "1008 classes: judge inception, the network of FID; 1000: judge inception_v3, whose numbers are others",
            )

    @torch.inference_mode()
    def _forward(self, images: list[ByteArray]) -> torch.Tensor:
        self.load()
        mean, deviation = np.asarray(self.mean, np.float32), np.asarray(self.deviation, np.float32)
        pixels = np.stack([(resize_clean_fid(image) - mean) / deviation for image in images])
        inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return pooled_features(inputs, self._network, self.classes == FIDInceptionV3.classes)


class InceptionV3(FIDInceptionV3):
    """The ImageNet network of torchvision and timm (e.g. `timm/inception_v3.tv_in1k`): no FID comes of its features."""

    name = "inception_v3"
    classes = 1000

    def _check(self, config: dict[str, Any]) -> None:
        super()._check(config)
        settings = config.get("pretrained_cfg") or {}
        self.mean = tuple(255.0 * float(value) for value in settings.get("mean", (0.5, 0.5, 0.5)))
        self.deviation = tuple(255.0 * float(value) for value in settings.get("std", (0.5, 0.5, 0.5)))


def check_weights(weights: dict[str, torch.Tensor], classes: int, where: str) -> None:
    """Raise IntegrityError unless these are the weights of an Inception-v3 with so many classes."""
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    wanted = [*(f"{layer}.{part}" for layer in layer_names() for part in parts), "fc.weight"]
    absent = [name for name in wanted if name not in weights]
    if absent:
        raise IntegrityError(f"{where}: {len(absent)} weights are not in the checkpoint (first: {absent[0]})", "fetch it again")
    try:
        with torch.inference_mode():
            given = {name: weights[name].float() for name in wanted}
            width = pooled_features(torch.zeros(1, 3, SMALLEST, SMALLEST), given, True).shape[1]
    except RuntimeError as error:
        raise IntegrityError(f"{where}: the weights do not fit each other: {' '.join(str(error).split())[:200]}") from error
    if tuple(weights["fc.weight"].shape) != (classes, width):
        shape = list(weights["fc.weight"].shape)
        raise IntegrityError(f"{where}: fc.weight is {shape}, not [{classes}, {width}]", "name another checkpoint or judge")
