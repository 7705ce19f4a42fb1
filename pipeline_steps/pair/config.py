"""Parameters of the pair stage. The defaults are the embedded preset."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig


class PairConfig(StageConfig):
    """Section `pair` of `params.yaml`."""

    min_confidence: float = Field(0.05, ge=0, le=1, description="events below it are not used")
    null_quantile: float = Field(0.99, ge=0, lt=1, description="quantile of z over random sounds that a match must beat")
    null_samples: int = Field(200_000, ge=100, le=20_000_000, description="random text-sound scores that estimate it")
    combine: Literal["max", "mean"] = Field(
        "max", description="a sound's value over a picture's events: best, or weighted mean"
    )
    event_emphasis: float = Field(0.5, ge=0, le=4, description="exponent of salience x confidence; 0 treats all events alike")
    candidates: int = Field(50, ge=1, le=1000, description="sounds kept per picture for the assignment")
    max_reuse: int = Field(4, ge=1, le=1_000_000, description="pictures per duplicate group of sounds")
    exact_edges: int = Field(600_000, ge=0, le=50_000_000, description="edges x cap up to which the assignment is exact")
    auction_epsilon: float = Field(
        0.01, gt=0, le=1, description="above: loss per picture allowed, as a share of the mean value"
    )
    audio_duplicate_cosine: float = Field(0.995, gt=0, le=1, description="sounds at least this close are one group")
    image_duplicate_bits: int = Field(4, ge=0, le=16, description="hash distance at which a crossing counts as a leak")
    sound_test_share: float = Field(0.3, ge=0, le=0.5, description="share of the sound groups that only the test hears")
    sound_val_share: float = Field(0.08, ge=0, le=0.5, description="share of the sound groups for validation")
    image_test_share: float = Field(
        0.6, ge=0, le=0.9, description="share for the test, of picture groups with a good sound there"
    )
    image_val_share: float = Field(0.2, ge=0, le=0.9, description="the same for validation")
    split_margin: float = Field(0.6, ge=0, le=1, description="share of its best value a picture must find in its split")
    target_lufs: float | None = Field(None, ge=-60, le=-5, description="loudness of a track after gain; null keeps it as it is")
    max_gain_db: float = Field(12.0, ge=0, le=40, description="bound of that gain, both ways")
    licenses: Literal["any", "publishable", "no-copyleft"] = Field("any", description="which sources may enter pairs")
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.sound_test_share + self.sound_val_share > 0.6:
            raise ValueError("sound_test_share + sound_val_share must leave at least 0.4 of the sounds for training")
        if self.image_test_share + self.image_val_share > 0.9:
            raise ValueError("image_test_share + image_val_share must leave at least 0.1 of the pictures for training")
        return self
