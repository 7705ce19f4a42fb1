"""Complete vector index of another package: exact search in reduced dimensions. Importing it registers it."""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field

from pipeline_steps.core.array_types import FloatArray, IntArray
from pipeline_steps.core.config import StageConfig
from pipeline_steps.retrieve.index.base import INDEXES, IndexSettings, VectorIndex
from pipeline_steps.retrieve.index.top_k import top_k


class ToyIndexConfig(StageConfig):
    """Group `retrieve.toy`."""

    dimensions: int = Field(default=4096, ge=1, description="first numbers of a vector that are compared")


@INDEXES.register("toy")
class ToyIndex(VectorIndex):
    """Index that compares the first numbers of the vectors."""

    config_class = ToyIndexConfig
    indexes_texts = True

    def __init__(self, items: FloatArray, dimensions: int) -> None:
        self.items, self.dimensions = items, dimensions

    @classmethod
    def build(cls, items: FloatArray, queries: FloatArray, config: ToyIndexConfig, settings: IndexSettings) -> Self:
        return cls(items, config.dimensions)

    @property
    def n_items(self) -> int:
        return len(self.items)

    def search(self, queries: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
        end = self.dimensions
        return top_k(np.asarray(queries[:, :end] @ self.items[:, :end].T, np.float32), k)

    def metrics(self) -> dict[str, float]:
        return {"dimensions": self.dimensions}
