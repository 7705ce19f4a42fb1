"""Parameters of stage `embed`. The parameters of an encoder are a group defined beside the encoder."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from pipeline_steps.core.executors.base import ItemStageConfig
from pipeline_steps.models.text_audio.base import TEXT_AUDIO_ENCODERS


class EmbedConfig(ItemStageConfig):
    """Section `embed` of `params.yaml`."""

    registries: ClassVar = {"encoder": TEXT_AUDIO_ENCODERS}

    encoder: str = Field(
        "yamnet_minilm", description="text-audio encoder: yamnet_minilm, clap, pe_av, laion_clap or an installed one"
    )
    batch_size: int = Field(64, ge=1, le=4096, description="texts or clips per cache part and per call of an actor")

    @property
    def encoder_config(self) -> Any:
        """Group of the selected encoder; None if the encoder has no parameters."""
        return self.implementation_config(self.encoder)

    @model_validator(mode="after")
    def _check_encoder(self) -> EmbedConfig:
        TEXT_AUDIO_ENCODERS.get(self.encoder).check_config(self.encoder_config)
        return self
