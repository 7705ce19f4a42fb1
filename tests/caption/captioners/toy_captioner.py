"""Complete captioner of another package: bright images sound like a barking dog, dark ones are silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field

from pipeline_steps.caption.captioners.base import CAPTIONERS, Captioner, CaptionResult, SoundEvent
from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.core.config import StageConfig


class ToyConfig(StageConfig):
    """Group `caption.toy`."""

    phrase: str = Field("a dog barking", description="phrase of every event")
    min_brightness: float = Field(0.5, ge=0, le=1, description="mean of the pixels from which an image has the event")


@CAPTIONERS.register("toy")
class ToyCaptioner(Captioner[float]):
    """A prediction is the mean of the pixels, 0..1."""

    config_class = ToyConfig
    name = "toy"
    version = 1
    schema = pa.schema([pa.field("brightness", pa.float64())])

    @property
    def families(self) -> tuple[str, ...]:
        return ("toy",)

    def describe_prediction(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version}

    def describe_selection(self) -> dict[str, Any]:
        return {**super().describe_selection(), **self.config.model_dump()}

    def predict(self, images: Sequence[ByteArray]) -> list[float]:
        return [float(image.mean()) / 255 for image in images]

    def to_row(self, prediction: float) -> dict[str, Any]:
        return {"brightness": prediction}

    def from_row(self, row: Mapping[str, Any]) -> float:
        return float(row["brightness"])

    def caption(self, prediction: float) -> CaptionResult:
        reason = f"brightness {prediction:.2f}"
        if prediction < self.config.min_brightness:
            return CaptionResult(events=(), code="NO_SOUND", reason=reason, score=prediction)
        event = SoundEvent(self.config.phrase, sound_source="dog", visible=True, salience=1.0, confidence=prediction)
        if event.confidence < self.options.selection.min_confidence:
            return CaptionResult(events=(), code="LOW_CONFIDENCE", reason=reason, score=prediction, guesses=(event,))
        return CaptionResult(events=(event,), code="", reason="", score=prediction)
