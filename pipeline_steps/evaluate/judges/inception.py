"""Judge `inception`: the network of FID, and the layers that `inception_v3` shares (Szegedy et al. 2016, arXiv 1512.00567).

Two networks are called Inception-v3. FID, and the KID of papers, are defined on the first one:

- `inception`: Google's graph of 2015-12-05 with 1008 classes, as in pytorch-fid and torch-fidelity. Its average pools ignore
  the padding, and its last pool takes the maximum.
- `inception_v3`: the ImageNet network with 1000 classes, as in torchvision and timm.

Both use the weight names of torchvision, as all four packages do. Layer widths are those of the weights.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.errors import ConfigError, IntegrityError
from pipeline_steps.evaluate.judges.base import IMAGE_JUDGES
from pipeline_steps.evaluate.judges.hub_vision_model import HubImageFeatureExtractor

SIDE = 299
MIN_SIDE = 75
"""px; a smaller image has no pixel left in the last block."""
EPSILON = 1e-3
ARCHITECTURE = "inception_v3"

Chain = tuple[str, ...]
STEM: tuple[Chain, ...] = (("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"), ("Conv2d_3b_1x1", "Conv2d_4a_3x3"))
"""Chains of convolutions; a maximum pool follows each chain."""
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
"""Branches of each kind of block, in the order in which their outputs are concatenated."""
BLOCKS = {
    "Mixed_5b": "A", "Mixed_5c": "A", "Mixed_5d": "A", "Mixed_6a": "B", "Mixed_6b": "C", "Mixed_6c": "C", "Mixed_6d": "C",
    "Mixed_6e": "C", "Mixed_7a": "D", "Mixed_7b": "E", "Mixed_7c": "E",
}  # fmt: skip
STRIDED = {
    "Conv2d_1a_3x3",
    *(f"Mixed_6a.{chain[-1]}" for chain in BRANCHES["B"]),
    *(f"Mixed_7a.{chain[-1]}" for chain in BRANCHES["D"]),
}
UNPADDED = {*STRIDED, "Conv2d_2a_3x3", "Conv2d_4a_3x3"}
"""Convolutions without padding; all others keep the size of the map."""


def layer_names() -> list[str]:
    """Name of every convolution, each with a batch norm."""
    mixed = (f"{block}.{layer}" for block, kind in BLOCKS.items() for chain in BRANCHES[kind] for layer in chain)
    return list(dict.fromkeys([*(layer for chain in STEM for layer in chain), *mixed]))


def pooled_features(pixels: torch.Tensor, weights: dict[str, torch.Tensor], of_2015: bool) -> torch.Tensor:
    """Features [N, 2048] of normalized images [N, 3, H, W], H and W at least `MIN_SIDE`.

    Args:
        weights: tensors under torchvision's names.
        of_2015: whether to pool as the network of FID does.
    """

    def convolution(hidden: torch.Tensor, name: str) -> torch.Tensor:
        kernel = weights[f"{name}.conv.weight"]
        padding = (0, 0) if name in UNPADDED else (kernel.shape[2] // 2, kernel.shape[3] // 2)
        hidden = F.conv2d(hidden, kernel, stride=2 if name in STRIDED else 1, padding=padding)
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
    """Resize RGB uint8 [H, W, 3] to float32 [side, side, 3]: bicubic with antialiasing, without rounding.

    This is the resize of clean-fid (Parmar et al. 2022, arXiv 2104.11222). pytorch-fid resizes bilinearly without
    antialiasing, which gives other numbers.
    """
    channels = [Image.fromarray(image[..., channel].astype(np.float32)) for channel in range(3)]
    return np.stack([np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels], axis=-1)


@IMAGE_JUDGES.register("inception")
class FIDInceptionV3(HubImageFeatureExtractor):
    """Images to 2048 pooled features of the network of FID. Rejects weights of any other Inception.

    A checkpoint is a folder or hub id with `config.json` (`architecture: inception_v3`, `num_classes`) and safetensors.
    `python -m pipeline_steps.evaluate.judges.convert_inception` converts a published .pth file to such a folder.

    Attributes:
        mean, std: of pixel values 0 to 255. The graph of 2015 computes (x - 128) / 128.
    """

    name = "inception"
    family = "inception"
    version = 1
    classes: ClassVar[int] = 1008
    mean: tuple[float, ...] = (128.0, 128.0, 128.0)
    std: tuple[float, ...] = (128.0, 128.0, 128.0)

    def load(self) -> Self:
        """Load and check the weights; a second call does nothing.

        Raises:
            ConfigError: the checkpoint has another number of classes.
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
                "use judge inception (FID) with 1008 classes, judge inception_v3 with 1000 classes",
            )

    @torch.inference_mode()
    def _forward(self, images: list[ByteArray]) -> torch.Tensor:
        self.load()
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        pixels = np.stack([(resize_clean_fid(image) - mean) / std for image in images])
        inputs = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)).to(self.device)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            return pooled_features(inputs, self._network, self.classes == FIDInceptionV3.classes)


def check_weights(weights: dict[str, torch.Tensor], classes: int, where: str) -> None:
    """Raise IntegrityError unless `weights` are those of an Inception-v3 with `classes` classes."""
    parts = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    wanted = [*(f"{layer}.{part}" for layer in layer_names() for part in parts), "fc.weight"]
    absent = [name for name in wanted if name not in weights]
    if absent:
        raise IntegrityError(f"{where}: {len(absent)} weights are not in the checkpoint (first: {absent[0]})", "fetch it again")
    try:
        with torch.inference_mode():
            given = {name: weights[name].float() for name in wanted}
            width = pooled_features(torch.zeros(1, 3, MIN_SIDE, MIN_SIDE), given, True).shape[1]
    except RuntimeError as error:
        raise IntegrityError(f"{where}: the weights do not fit each other: {' '.join(str(error).split())[:200]}") from error
    if tuple(weights["fc.weight"].shape) != (classes, width):
        shape = list(weights["fc.weight"].shape)
        raise IntegrityError(f"{where}: fc.weight is {shape}, not [{classes}, {width}]", "name another checkpoint or judge")
