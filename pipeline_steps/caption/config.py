"""Parameters of the `caption` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline_steps.core.config import StageConfig


class Config(StageConfig):
    """Which captioner looks at the pictures, and what counts as an event."""

    captioner: Literal["tagger"] = Field("tagger", description="`tagger`: ImageNet tags through the sound lexicon")
    detectors: list[Literal["ssd"]] = Field(
        default_factory=list, max_length=1, description="further taggers; `ssd` forbids judges of the family ssd-mobilenet"
    )
    models: list[Literal["efficientnet_lite0", "efficientnet_lite3"]] = Field(
        ["efficientnet_lite0", "efficientnet_lite3"],
        min_length=1,
        max_length=2,
        description="networks whose probabilities are averaged, in any order",
    )
    views: list[Literal["crop", "pad", "stretch"]] = Field(
        ["crop"], min_length=1, max_length=3, description="framings of a picture whose probabilities are averaged"
    )
    min_probability: float = Field(1e-3, gt=0, lt=1, description="tags below it are forgotten")
    prior_strength: float = Field(0.5, ge=0, le=1, description="how far the tagger's favourite labels are discounted; 0: not")
    max_events: int = Field(5, ge=1, le=20, description="events kept per picture")
    min_confidence: float = Field(0.15, ge=0, le=1, description="a picture abstains unless one of its events reaches it")
    min_share: float = Field(
        0.1, ge=0, le=1, description="a further event below this share of the best one's weight is dropped"
    )
    max_phrase: int = Field(120, ge=8, le=2000, description="characters of an event's phrase")
    batch_size: int = Field(32, ge=1, le=4096, description="pictures per forward pass and per memo part")
    max_bad_fraction: float = Field(0.05, ge=0, le=1, description="the stage fails above this share of quarantined pictures")
    memo: str = Field("", max_length=1000, description="folder or fsspec URL of the memo; empty: .cache/items")
