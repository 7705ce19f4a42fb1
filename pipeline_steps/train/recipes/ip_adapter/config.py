"""Group `train.ip_adapter` of params.yaml."""

from __future__ import annotations

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.train.config_groups import PhaseConfig
from pipeline_steps.train.recipes.base import RecipeConfig


class BackboneConfig(StageConfig):
    """Frozen text-to-image model: a Stable Diffusion 1.x or 2.x in the diffusers layout."""

    model: str = Field(default="data/assets/backbone", min_length=1, max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )
    prompt: str = Field(
        default="{}",
        max_length=1000,
        description="prompt of a source, {} is its name; without {} a text for every clip; empty: no text",
    )


class ResamplerConfig(StageConfig):
    """Resampler: encoder tokens of any number -> a few tokens for cross-attention."""

    num_queries: int = Field(default=4, ge=1, le=256, description="tokens that the U-Net attends to")
    dim: int = Field(default=128, ge=16, le=4096, multiple_of=2, description="width of the resampler")
    depth: int = Field(default=1, ge=1, le=24, description="blocks of the resampler")
    heads: int = Field(default=4, ge=1, le=64, description="attention heads; divides dim")
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0, description="dropout of attention weights")

    @model_validator(mode="after")
    def _check(self) -> ResamplerConfig:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        return self


class IPAdapterPhases(StageConfig):
    """Phases of training."""

    adapter: PhaseConfig = PhaseConfig()


class IPAdapterConfig(RecipeConfig):
    """Recipe `ip_adapter`: audio conditioning of a frozen text-to-image backbone."""

    backbone: BackboneConfig = BackboneConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    conditioning_dropout_prob: float = Field(
        default=0.15, ge=0.0, lt=1.0, description="probability that a sample is trained without audio and prompt"
    )
    sample_latents: bool = Field(
        default=True, description="latents sampled from the autoencoder's distribution; false: its mean, half the disk"
    )
    snr_gamma: float = Field(
        default=5.0, gt=0.0, le=1000.0, description="min-SNR-gamma: signal-to-noise ratio above which a time has less weight"
    )
    phases: IPAdapterPhases = IPAdapterPhases()

    @property
    def phase(self) -> PhaseConfig:
        """The only phase."""
        return self.phases.adapter
