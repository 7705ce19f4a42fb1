"""Parameters of the `embed` stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.executors.base import ExecutorName, RayConfig


class ClapEncoderConfig(StageConfig):
    """Encoder `clap`: a ClapModel checkpoint of transformers."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: bfloat16 on GPU")
    backend: Literal["torch", "openvino", "openvino-int8"] = Field(default="torch", description="of the sounds on a CPU")
    int8_recall_floor: float = Field(
        default=0.99, ge=0, le=1, description="recall@10 of openvino-int8 on a sample of the pool; below it float32 is used"
    )


class LaionClapEncoderConfig(StageConfig):
    """Encoder `laion`: an original checkpoint, run by the laion-clap package in its own environment."""

    checkpoint: str = Field(default="", max_length=500, description="laion-clap's .pt file")
    sha256: str = Field(default="", pattern=r"^([0-9a-f]{64})?$", description="of that file, checked when given")
    text: str = Field(default="", max_length=500, description="folder with RoBERTa's configuration and vocabulary")
    device: Literal["auto", "cpu", "cuda"] = "auto"


class EmbedConfig(StageConfig):
    """Which text-audio space, and how sounds are cut into windows."""

    encoder: Literal["bridge", "clap", "laion"] = Field(
        "bridge", description="`bridge`: YAMNet tags x MiniLM; `clap`: a ClapModel; `laion`: laion-clap's own checkpoints"
    )
    clap: ClapEncoderConfig = ClapEncoderConfig()
    laion: LaionClapEncoderConfig = LaionClapEncoderConfig()
    recipe: Literal["tags", "plain"] = Field("tags", description="`plain` is the baseline, kept for comparison")
    temperature: float = Field(0.06, ge=0.005, le=1, description="of the softmax over tag similarities of a text")
    phrase_weight: float = Field(0.5, ge=0, le=1, description="weight of a tag's hand-written phrases against its name")
    loudness_power: float = Field(0.5, ge=0, le=2, description="windows are averaged with weights RMS ** power")
    batch_size: int = Field(64, ge=1, le=4096, description="texts or sounds per memo part and per call of an actor")
    max_failed_fraction: float = Field(0.05, ge=0, le=1, description="the stage fails above this share of quarantined items")
    cache_dir: str = Field("", max_length=1000, description="folder or fsspec URL of the memo; empty: .cache/items")
    executor: ExecutorName = Field("local", description="`local`: this process; `ray`: actors of a Ray cluster")
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _model(self) -> EmbedConfig:
        if self.encoder == "clap" and not self.clap.model:
            raise ValueError("encoder clap needs clap.model, a hub id or a folder")
        if self.encoder == "laion" and not (self.laion.checkpoint and self.laion.text):
            raise ValueError("encoder laion needs laion.checkpoint, a .pt file, and laion.text, a folder")
        return self
