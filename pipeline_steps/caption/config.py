"""Parameters of stage `caption`."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from pipeline_steps.caption.captioners.base import CAPTIONERS
from pipeline_steps.caption.captioners.prompt import PromptConfig
from pipeline_steps.core.executors.base import ItemStageConfig


class CaptionConfig(ItemStageConfig):
    """Section `caption`. Each captioner has a group of its own, whose model is the `config_class` of the captioner."""

    registries: ClassVar = {"captioner": CAPTIONERS}

    captioner: str = Field(
        "tagger", max_length=100, description="name of a captioner: `tagger`, `text`, `vlm`, `openai_server`"
    )
    prompt: PromptConfig = PromptConfig()
    use_text: bool = Field(
        default=False, description="give `vlm` and `openai_server` the words that came with an image (`ingest.columns.text`)"
    )
    max_events: int = Field(5, ge=1, le=20, description="maximum number of events per image")
    min_confidence: float = Field(0.15, ge=0, le=1, description="the stage abstains on images below this confidence")
    min_relative_weight: float = Field(
        0.1, ge=0, le=1, description="events below this fraction of the image's highest weight are dropped"
    )
    max_phrase_chars: int = Field(120, ge=8, le=2000, description="maximum length of a phrase in characters")
    batch_size: int = Field(32, ge=1, le=4096, description="images per forward pass and per cache file")

    @model_validator(mode="after")
    def _check_captioner(self) -> Self:
        captioner = CAPTIONERS.get(self.captioner)
        if self.use_text and captioner.text_input == "none":
            raise ValueError(f"use_text is true, but captioner {self.captioner!r} reads no words; set use_text: false")
        captioner.check_config(self.implementation_config(self.captioner) or captioner.config_class(), self.executor)
        return self
