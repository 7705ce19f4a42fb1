"""Features of judges behind the result cache, and the construction of judges from the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline_steps.audio.log_mel import map_threads
from pipeline_steps.core.array_types import ByteArray, DoubleArray, FloatArray
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.result_cache import ResultCache
from pipeline_steps.evaluate.config import EvaluateConfig
from pipeline_steps.evaluate.judges.base import ImageFeatureExtractor, JudgeSetup

log = logging.getLogger(__name__)

VECTOR = pa.schema([pa.field("vector", pa.list_(pa.float32()))])
"""Schema of cached features."""

CacheFactory = Callable[[str, Any], ResultCache]
"""Opens the result cache (schema `VECTOR`) of a cache stage and a description of everything but the item."""


def judge_setup(config: EvaluateConfig, name: str, layout: ProjectPaths) -> JudgeSetup:
    """Arguments from which judge `name` is built."""
    checkpoints = config.judge_checkpoints
    chosen = checkpoints.get(name)
    group = config.implementation_config(name)
    return JudgeSetup(layout.assets, layout.root, chosen.model, chosen.revision, checkpoints.device, checkpoints.dtype, group)


class CachedFeatures:
    """Feature rows by key, each computed at most once per cache.

    Attributes:
        cache_misses: rows computed so far.
        cache_hits: rows read from the cache so far.
    """

    def __init__(self, cache: ResultCache, batch_size: int) -> None:
        self._cache = cache
        self._batch_size = batch_size
        self.cache_misses = self.cache_hits = 0

    def rows(self, keys: Sequence[str], compute: Callable[[Sequence[str]], FloatArray]) -> dict[str, DoubleArray]:
        """Features [D] by key; `compute` returns the rows [N, D] of keys that are not cached."""
        wanted = sorted(set(keys))
        rows = {key: np.asarray(vector, np.float64) for key, vector in self._cache.vectors(wanted).items()}
        self.cache_hits += len(rows)
        missing = [key for key in wanted if key not in rows]
        for start in range(0, len(missing), self._batch_size):
            batch = missing[start : start + self._batch_size]
            vectors = np.asarray(compute(batch), np.float32)
            self._cache.append({key: {"vector": vector} for key, vector in zip(batch, vectors, strict=True)})
            rows.update({key: vector.astype(np.float64) for key, vector in zip(batch, vectors, strict=True)})
            self.cache_misses += len(batch)
            log.info("extracted features of %d of %d new items", start + len(batch), len(missing))
        return rows


def map_items(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Results of `function` in order, on as many threads as torch uses, each item on one thread.

    A network call on one thread gives the same bits on machines with different numbers of cores.
    """
    return map_threads(function, items, torch.get_num_threads())


def extract_image_features(judge: ImageFeatureExtractor, images: Sequence[ByteArray]) -> FloatArray:
    """Features [N, D] of images: in batches, or one by one on several threads if the judge has batch size 1."""
    if judge.batch_size > 1:
        return judge.features(images)
    return np.stack(map_items(lambda image: judge.features([image])[0], images))


def extract_generated_features(judge: ImageFeatureExtractor, images: ByteArray) -> DoubleArray:
    """Features [..., D] of generated images uint8 [..., H, W, 3]."""
    rows = extract_image_features(judge, list(images.reshape(-1, *images.shape[-3:])))
    return np.asarray(rows, np.float64).reshape(*images.shape[:-3], -1)
