"""The judge networks behind a memo: what was looked at or listened to once is not computed again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from pipeline_steps.core.array_types import ByteArray, FloatArray
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.evaluate.config import JudgeCheckpointConfig, JudgeCheckpointsConfig
from pipeline_steps.evaluate.judges.aisfx import AiSfx
from pipeline_steps.evaluate.judges.augnet import AugNet
from pipeline_steps.evaluate.judges.clip import ClipImageEncoder
from pipeline_steps.evaluate.judges.dinov2 import Dinov2
from pipeline_steps.evaluate.judges.hub_vision_model import HubImageFeatureExtractor
from pipeline_steps.evaluate.judges.inception import FIDInceptionV3, InceptionV3
from pipeline_steps.models.vision.efficientnet_lite import EfficientNetLite0
from pipeline_steps.models.vision.ssd_mobilenet_v2 import SsdMobileNetV2

log = logging.getLogger(__name__)


VECTOR = pa.schema([pa.field("vector", pa.list_(pa.float32()))])
AUGNET_SIDE = 128
"""px; drawn pictures are small, a larger input costs time and shows nothing more."""

PictureJudge = AugNet | EfficientNetLite0 | SsdMobileNetV2 | HubImageFeatureExtractor
CHECKPOINT_JUDGES: dict[str, type[HubImageFeatureExtractor]] = {
    judge.name: judge for judge in (Dinov2, ClipImageEncoder, FIDInceptionV3, InceptionV3)
}


class CacheFactory(Protocol):
    """Opens the memo of a stage name and a description of everything but the item that shapes a result."""

    def __call__(self, stage: str, description: Any) -> ResultCache:
        """A memo with schema `VECTOR`."""
        ...


Key = TypeVar("Key")
Value = TypeVar("Value")


def build_image_judge(name: str, assets: Path, checkpoints: JudgeCheckpointsConfig, root: Path) -> PictureJudge:
    """The network of a picture judge; its weights are not loaded yet. `root` is where a relative folder may lie."""
    if name in CHECKPOINT_JUDGES:
        chosen: JudgeCheckpointConfig = getattr(checkpoints, name)
        return CHECKPOINT_JUDGES[name](chosen.model, chosen.revision, checkpoints.device, checkpoints.precision, root)
    if name == "augnet":
        return AugNet(assets, short_side=AUGNET_SIDE)
    return SsdMobileNetV2(assets) if name == "ssd_mobilenet_v2" else EfficientNetLite0(assets)


def build_audio_judge(assets: Path) -> AiSfx:
    """The network of the sound judge; its weights are not loaded yet."""
    return AiSfx(assets)


class CachedFeatures:
    """Feature rows by key (an item id), computed at most once per memo; its schema is `VECTOR`."""

    def __init__(self, memo: ResultCache, batch_size: int) -> None:
        self._memo = memo
        self._batch_size = batch_size
        self.computed = self.reused = 0

    def rows(self, keys: Sequence[str], compute: Callable[[Sequence[str]], FloatArray]) -> dict[str, npt.NDArray[np.float64]]:
        """key -> [D]; `compute` makes the rows [N, D] of keys not met before."""
        wanted = sorted(set(keys))
        known = {key: np.asarray(vector, np.float64) for key, vector in self._memo.vectors(wanted).items()}
        self.reused += len(known)
        missing = [key for key in wanted if key not in known]
        for start in range(0, len(missing), self._batch_size):
            batch = missing[start : start + self._batch_size]
            vectors = np.asarray(compute(batch), np.float32)
            self._memo.append({key: {"vector": vector} for key, vector in zip(batch, vectors, strict=True)})
            known.update({key: vector.astype(np.float64) for key, vector in zip(batch, vectors, strict=True)})
            self.computed += len(batch)
            log.info("looked at or listened to %d of %d new items", min(start + self._batch_size, len(missing)), len(missing))
        return known


def map_threads(function: Callable[[Key], Value], keys: Sequence[Key]) -> list[Value]:
    """function(key) for every key, in order, on as many threads as torch has, each network call on one of them.

    Small networks do not get faster from more threads inside one call, and a call on one thread gives the same bits on
    every machine of a kind, however many cores it has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, keys))
    finally:
        torch.set_num_threads(threads)


def extract_image_features(judge: PictureJudge, pictures: Sequence[ByteArray]) -> FloatArray:
    """Features [N, D] of pictures: in batches where the judge computes on a GPU, else one by one, side by side."""
    if isinstance(judge, HubImageFeatureExtractor) and judge.together > 1:
        return judge.features(pictures)
    return np.stack(map_threads(lambda picture: judge.features([picture])[0], pictures))


def extract_generated_features(judge: PictureJudge, pictures: ByteArray) -> npt.NDArray[np.float64]:
    """Features [..., D] of drawn pictures uint8 [..., H, W, 3]."""
    rows = extract_image_features(judge, list(pictures.reshape(-1, *pictures.shape[-3:])))
    return np.asarray(rows, np.float64).reshape(*pictures.shape[:-3], -1)
