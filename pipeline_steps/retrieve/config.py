"""Parameters of stage `retrieve`. The parameters of an index are a group defined beside the index."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from pipeline_steps.core.config import StageConfig
from pipeline_steps.retrieve.index.base import INDEXES, IndexSettings


class HubnessCorrectionConfig(StageConfig):
    """Group `retrieve.hubness_correction`."""

    method: Literal["none", "csls", "dis"] = Field(default="csls", description="none, csls, or dis (dynamic inverted softmax)")
    k: int = Field(default=20, ge=1, le=1000, description="neighborhood of csls; rank that activates dis")
    beta: float = Field(default=5.0, gt=0, le=1000, description="inverse temperature of dis")


class RetrieveConfig(StageConfig):
    """Section `retrieve` of `params.yaml`."""

    registries: ClassVar = {"index": INDEXES}

    index: str = Field(
        "auto", description="index of the audio: exact, ivf, torch, annoy, an installed one, or auto (by size of the pool)"
    )
    k: int = Field(50, ge=1, le=1000, description="neighbors per text")
    query_batch_size: int = Field(1024, ge=1, le=65536, description="queries per matrix product")
    hubness_correction: HubnessCorrectionConfig = HubnessCorrectionConfig()
    null_sample_size: int = Field(2000, ge=2, le=1_000_000, description="random pool clips that calibrate each text's scores")
    recall_sample_size: int = Field(500, ge=1, le=100_000, description="texts on which the recall of annoy and ivf is measured")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="of the indexes and of the samples")

    @property
    def index_settings(self) -> IndexSettings:
        """Settings that apply to every index."""
        return IndexSettings(self.seed, self.query_batch_size, self.recall_sample_size)
