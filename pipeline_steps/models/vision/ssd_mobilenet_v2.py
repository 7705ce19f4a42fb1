"""SSD-MobileNet-v2: objects, boxes and features of images (Google, Apache-2.0; ssd_mobilenet_v2_coco_2018_03_29).

Sources: https://arxiv.org/abs/1512.02325 (SSD), https://arxiv.org/abs/1801.04381 (MobileNet v2), and the TensorFlow object
detection API for the anchors and the box coder. A plain torch port: no TensorFlow, no OpenCV.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.models.bundled_weights import BundledModel
from pipeline_steps.models.layers import conv2d_same
from pipeline_steps.models.vision.coco_labels import COCO_LABELS
from pipeline_steps.models.vision.image_transforms import resize, to_chw

SIDE = 300
CLASSES = 91
STAGES = ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
"""(blocks, stride of the first block) of each MobileNet stage."""
FIRST_DETECTION_BLOCK = 13
FEATURES = 960
GRIDS = (19, 10, 5, 3, 2, 1)
SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
IOU = 0.6
MAX_DETECTIONS = 100
CANDIDATES = 200


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: its label, class index (1..90, COCO id), score 0..1 and box (top, left, bottom, right) in 0..1."""

    label: str
    index: int
    score: float
    box: tuple[float, float, float, float]


class SsdMobileNetV2(BundledModel):
    """Object detector and feature extractor. Images are stretched to 300 x 300, as in training."""

    name = "ssd_mobilenet_v2"
    family = "ssd-mobilenet"
    version = 2
    files = ("ssd_mobilenet_v2.safetensors",)
    labels = tuple(COCO_LABELS.values())
    """80 COCO labels in id order."""

    @torch.inference_mode()
    def detect(self, images: Sequence[ByteArray], min_score: float = 0.1) -> list[list[Detection]]:
        """Objects of each RGB image, best first, at most 100, after per-class suppression at IoU 0.6."""
        return [self._decode(*self.forward(self._input(image)), min_score) for image in images]

    @torch.inference_mode()
    def features(self, images: Sequence[ByteArray]) -> FloatArray:
        """Rows [N, 960] for similarities: the last depthwise map of the backbone, averaged over the middle 60 % of the image.

        Of the variants measured, this layer and window separate the labels of small images best
        (docs/results/notebook/judges.md).
        """
        rows = np.zeros((len(images), FEATURES), np.float32)
        for row, image in enumerate(images):
            deepest = self._trunk(self._input(image))[1]
            edge = deepest.shape[-1] // 5
            rows[row] = deepest[0, :, edge:-edge, edge:-edge].mean((1, 2)).cpu().numpy()
        return rows

    def _prepare(self, payloads: dict[str, bytes]) -> None:
        """Channels-last kernels: depthwise convolutions are more than twice as fast on a CPU."""
        assert self._weights is not None
        for name, tensor in self._weights.items():
            if tensor.ndim == 4:
                self._weights[name] = tensor.contiguous(memory_format=torch.channels_last)

    def _input(self, image: ByteArray) -> torch.Tensor:
        small = resize(image, SIDE, SIDE, Image.Resampling.BILINEAR)
        batch = torch.from_numpy(to_chw(small, 127.5, 1 / 127.5))[None].to(self.device)
        return batch.contiguous(memory_format=torch.channels_last)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Box codes [N, 1917, 4] and class logits [N, 1917, 91] of images [N, 3, 300, 300] in [-1, 1]."""
        first, _, deepest = self._trunk(inputs)
        levels = [first, self._unit(deepest, "head")]
        for extra in range(2, 6):
            hidden = self._unit(levels[-1], f"extra.{extra}.reduce")
            hidden = self._unit(hidden, f"extra.{extra}.depthwise", stride=2)
            levels.append(self._unit(hidden, f"extra.{extra}.expand"))
        boxes = [self._predict(features, f"boxes.{level}", 4) for level, features in enumerate(levels)]
        logits = [self._predict(features, f"classes.{level}", CLASSES) for level, features in enumerate(levels)]
        return torch.cat(boxes, 1), torch.cat(logits, 1)

    def _predict(self, features: torch.Tensor, name: str, size: int) -> torch.Tensor:
        output = conv2d_same(features, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
        return output.permute(0, 2, 3, 1).reshape(len(features), -1, size)

    def _trunk(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """MobileNet: the map of the first detection level [N, 576, 19, 19], the last depthwise map and its projection."""
        first = inputs
        hidden = self._unit(inputs, "stem", stride=2)
        index = 0
        for blocks, first_stride in STAGES:
            for position in range(blocks):
                name, entry = f"blocks.{index}", hidden
                if index:
                    hidden = self._unit(hidden, f"{name}.expand")
                if index == FIRST_DETECTION_BLOCK:
                    first = hidden
                depthwise = self._unit(hidden, f"{name}.depthwise", first_stride if position == 0 else 1)
                hidden = F.conv2d(depthwise, self.weights[f"{name}.project.weight"], self.weights[f"{name}.project.bias"])
                if hidden.shape == entry.shape:
                    hidden = hidden + entry
                index += 1
        return first, depthwise, hidden

    def _unit(self, inputs: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        """Convolution (depthwise where the weight says so), bias, ReLU6."""
        weight = self.weights[f"{name}.weight"]
        return F.relu6(conv2d_same(inputs, weight, self.weights[f"{name}.bias"], stride, inputs.shape[1] // weight.shape[1]))

    def _decode(self, codes: torch.Tensor, logits: torch.Tensor, min_score: float) -> list[Detection]:
        scores = torch.sigmoid(logits[0, :, 1:]).cpu()
        boxes = decode_boxes(codes[0].cpu())
        found: list[Detection] = []
        for index in torch.nonzero(scores.amax(0) >= min_score)[:, 0].tolist():
            label = COCO_LABELS.get(index + 1)
            if label is None:
                continue
            column = scores[:, index]
            order = column.argsort(descending=True, stable=True)[:CANDIDATES]
            order = order[column[order] >= min_score]
            for kept in suppress(boxes[order]):
                top, left, bottom, right = (float(value) for value in boxes[order[kept]].clamp(0, 1))
                found.append(Detection(label, index + 1, float(column[order[kept]]), (top, left, bottom, right)))
        return sorted(found, key=lambda detection: (-detection.score, detection.index))[:MAX_DETECTIONS]


@lru_cache(maxsize=1)
def anchors() -> torch.Tensor:
    """[1917, 4] anchor boxes (centre y, centre x, height, width) in 0..1: six grids, 3 boxes a cell on the first, then 6."""
    rows: list[tuple[float, float, float, float]] = []
    for level, grid in enumerate(GRIDS):
        scale = SCALES[level]
        if level == 0:
            sizes = [(0.1, 1.0), (scale, 2.0), (scale, 0.5)]
        else:
            sizes = [(scale, ratio) for ratio in (1.0, 2.0, 0.5, 3.0, 0.3333)]
            sizes.append((math.sqrt(scale * SCALES[level + 1]), 1.0))
        for y in range(grid):
            for x in range(grid):
                for size, ratio in sizes:
                    rows.append(((y + 0.5) / grid, (x + 0.5) / grid, size / math.sqrt(ratio), size * math.sqrt(ratio)))
    return torch.tensor(rows)


def decode_boxes(codes: torch.Tensor) -> torch.Tensor:
    """Box codes [1917, 4] (y, x, log height, log width; scaled by 10, 10, 5, 5) -> boxes (top, left, bottom, right)."""
    anchor = anchors()
    centre = codes[:, :2] / 10.0 * anchor[:, 2:] + anchor[:, :2]
    half = torch.exp(codes[:, 2:] / 5.0) * anchor[:, 2:] / 2.0
    return torch.cat([centre - half, centre + half], 1)


def suppress(boxes: torch.Tensor, iou: float = IOU) -> list[int]:
    """Greedy non-maximum suppression of boxes [N, 4] that are sorted best first; indices kept."""
    areas = (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)
    corner = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    shared = corner.clamp(min=0).prod(2)
    overlap = (shared / (areas[:, None] + areas[None] - shared).clamp(min=1e-12) > iou).tolist()
    kept: list[int] = []
    for row in range(len(boxes)):
        if not any(overlap[row][earlier] for earlier in kept):
            kept.append(row)
    return kept
