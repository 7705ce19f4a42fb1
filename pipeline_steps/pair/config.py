"""Parameters of stage `pair`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig


class AudioSplitConfig(StageConfig):
    """Group `pair.splits.audio`: fractions of the audio groups."""

    test: float = Field(default=0.3, ge=0, le=0.5, description="fraction of the audio groups that only the test split uses")
    val: float = Field(default=0.08, ge=0, le=0.5, description="fraction of the audio groups that only validation uses")

    @model_validator(mode="after")
    def _leave_training(self) -> Self:
        if self.test + self.val > 0.6:
            raise ValueError("audio.test + audio.val must leave at least 0.4 of the audio groups for training")
        return self


class ImageSplitConfig(StageConfig):
    """Group `pair.splits.image`: fractions of the image groups that have a good match in the split."""

    test: float = Field(default=0.6, ge=0, le=0.9, description="fraction for the test, of image groups with a good match there")
    val: float = Field(default=0.2, ge=0, le=0.9, description="fraction for validation, of image groups with a good match")

    @model_validator(mode="after")
    def _leave_training(self) -> Self:
        if self.test + self.val > 0.9:
            raise ValueError("image.test + image.val must leave at least 0.1 of the image groups for training")
        return self


class SplitsConfig(StageConfig):
    """Group `pair.splits`."""

    audio: AudioSplitConfig = AudioSplitConfig()
    image: ImageSplitConfig = ImageSplitConfig()


class PairConfig(StageConfig):
    """Section `pair` of `params.yaml`."""

    min_confidence: float = Field(0.05, ge=0, le=1, description="events below it are not used")
    null_quantile: float = Field(0.99, ge=0, lt=1, description="quantile of random z-scores that a match must reach")
    null_samples: int = Field(
        200_000, ge=100, le=20_000_000, description="random text-audio scores that estimate `null_quantile`"
    )
    event_pooling: Literal["max", "mean"] = Field(
        "max", description="value of a clip over the events of an image: maximum or weighted mean"
    )
    event_weight_exponent: float = Field(
        0.5, ge=0, le=4, description="exponent of salience x confidence; 0 weights all events alike"
    )
    num_candidates: int = Field(50, ge=1, le=1000, description="clips kept per image for the assignment")
    max_reuse: int = Field(4, ge=1, le=1_000_000, description="images per duplicate group of audio")
    exact_solver_max_edges: int = Field(
        600_000, ge=0, le=50_000_000, description="edges x `max_reuse` up to which the assignment is exact; above: auction"
    )
    auction_epsilon: float = Field(
        0.01, gt=0, le=1, description="auction: loss allowed per image, as a fraction of the mean value"
    )
    audio_duplicate_cosine: float = Field(0.995, gt=0, le=1, description="clips at least this similar are one group")
    image_phash_distance: int = Field(4, ge=0, le=16, description="hash distance up to which two images count as one leak")
    splits: SplitsConfig = SplitsConfig()
    min_relative_value_in_split: float = Field(
        0.6, ge=0, le=1, description="fraction of its best value that an image must reach in its split"
    )
    target_lufs: float | None = Field(None, ge=-60, le=-5, description="loudness of a clip after its gain; null: no gain")
    max_gain_db: float = Field(12.0, ge=0, le=40, description="largest absolute gain")
    license_policy: Literal["any", "publishable", "no-copyleft"] = Field("any", description="licenses that may enter pairs")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random in the stage")
