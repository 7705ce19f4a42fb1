"""The judge networks behind a memo: what was looked at or listened to once is not computed again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline_steps.core.identity import fingerprint
from pipeline_steps.core.memo import Memo
from pipeline_steps.encoders.aisfx import AiSfx
from pipeline_steps.encoders.augnet import AugNet
from pipeline_steps.encoders.efficientnet_lite0 import EfficientNetLite0
from pipeline_steps.encoders.pictures import frame_square, resize
from pipeline_steps.encoders.protocols import AudioFeatures, ImageFeatures
from pipeline_steps.encoders.ssd_mobilenet_v2 import SsdMobileNetV2

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

VECTOR = pa.schema([pa.field("vector", pa.list_(pa.float32()))])
AUGNET_SIDE = 128
"""px; drawn pictures are small, a larger input costs time and shows nothing more."""

log = logging.getLogger(__name__)


def picture_judge(name: str, assets: Path) -> ImageFeatures:
    """The network of a picture judge; its weights are not loaded yet."""
    if name == "augnet":
        return AugNet(assets, short_side=AUGNET_SIDE)
    return {"ssd_mobilenet_v2": SsdMobileNetV2, "efficientnet_lite0": EfficientNetLite0}[name](assets)


def sound_judge(name: str, assets: Path) -> AudioFeatures:
    """The network of a sound judge; its weights are not loaded yet."""
    return {"aisfx": AiSfx}[name](assets)


def as_drawn(picture: ByteArray, side: int) -> ByteArray:
    """A real picture as the model could at best have drawn it: padded to a white square, `side` px, bicubic with
    antialiasing. Real and drawn pictures must reach a judge through the same resize (clean-fid, arXiv 2104.11222)."""
    return resize(frame_square(picture, "pad"), side, side)


class MemoisedFeatures:
    """Feature rows by key (item id, text id), computed at most once per (memo stage, description)."""

    def __init__(self, url: str, stage: str, description: Any, batch_size: int) -> None:
        self._memo = Memo(url, stage, fingerprint(description), VECTOR)
        self._batch_size = batch_size
        self.computed = self.reused = 0

    def rows(self, ids: Sequence[str], compute: Callable[[str], FloatArray]) -> dict[str, npt.NDArray[np.float64]]:
        """id -> [D]; `compute` is called for ids not met before."""
        wanted = sorted(set(ids))
        known = {key: np.asarray(row["vector"], np.float64) for key, row in self._memo.load(wanted).items()}
        self.reused += len(known)
        missing = [item for item in wanted if item not in known]
        for start in range(0, len(missing), self._batch_size):
            batch = {item: np.asarray(compute(item), np.float32) for item in missing[start : start + self._batch_size]}
            self._memo.append({item: {"vector": vector} for item, vector in batch.items()})
            known.update({item: vector.astype(np.float64) for item, vector in batch.items()})
            self.computed += len(batch)
        return known


def drawn_features(judge: ImageFeatures, pictures: ByteArray) -> npt.NDArray[np.float64]:
    """Features [..., D] of drawn pictures uint8 [..., H, W, 3]."""
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    rows = judge.features(list(flat))
    return np.asarray(rows, np.float64).reshape(*pictures.shape[:-3], -1)
