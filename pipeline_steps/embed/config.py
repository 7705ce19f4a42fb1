"""Parameters of the `embed` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline_steps.core.config import StageConfig


class Config(StageConfig):
    """Which text-audio space, and how sounds are cut into windows."""

    encoder: Literal["bridge"] = Field("bridge", description="`bridge`: YAMNet tags x MiniLM")
    recipe: Literal["tags", "plain"] = Field("tags", description="`plain` is the baseline, kept for comparison")
    temperature: float = Field(0.06, ge=0.005, le=1, description="of the softmax over tag similarities of a text")
    phrase_weight: float = Field(0.5, ge=0, le=1, description="weight of a tag's hand-written phrases against its name")
    loudness_power: float = Field(0.5, ge=0, le=2, description="windows are averaged with weights RMS ** power")
    batch_size: int = Field(64, ge=1, le=4096, description="sounds per memo part")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="the stage fails above this share of quarantined items")
    memo: str = Field("", max_length=1000, description="folder or fsspec URL of the memo; empty: .cache/items")
