"""Group `train.scratch` of params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.train.config_groups import (
    AudioEncodingConfig,
    ImageAugmentationConfig,
    PhaseConfig,
    SamplingConfig,
)
from pipeline_steps.train.recipes.base import RecipeConfig


class AutoencoderConfig(StageConfig):
    """Autoencoder: images <-> latents."""

    type: Literal["patch_pca", "tiny"] = Field(
        default="patch_pca", description="patch_pca: principal components and a refiner; tiny: AutoencoderTiny"
    )
    latent_channels: int = Field(default=24, ge=1, le=192)
    whitening: float = Field(
        default=0.25, ge=0.0, le=1.0, description="patch_pca: exponent that flattens the spectrum of the latents"
    )
    hidden_channels: int = Field(
        default=32, ge=0, le=256, multiple_of=8, description="channels of the refiner (0: no refiner) or of the autoencoder"
    )
    max_steps: int = Field(default=300, ge=0, le=100_000, description="gradient steps of the refiner or the autoencoder")
    batch_size: int = Field(default=16, ge=1, le=1024)
    learning_rate: float = Field(default=2e-3, gt=0.0, le=0.1)
    decoder_noise_std: float = Field(
        default=0.25, ge=0.0, le=2.0, description="largest noise on the latents that the decoder is trained with"
    )

    @model_validator(mode="after")
    def _check(self) -> AutoencoderConfig:
        if self.type == "tiny" and self.hidden_channels == 0:
            raise ValueError("hidden_channels is 0; type tiny requires at least 8")
        return self


class ConditionerConfig(StageConfig):
    """Audio conditioner: audio features -> tokens."""

    num_time_tokens: int = Field(default=8, ge=1, le=128, description="tokens over time")
    frame_pca_dim: int = Field(default=64, ge=1, le=1024, description="principal components of YAMNet's 1024-d frames")
    tag_pca_dim: int = Field(default=64, ge=1, le=521, description="principal components of the tag logits")
    hidden_dim: int = Field(default=192, ge=16, le=2048, multiple_of=16, description="width of the tokens")
    num_layers: int = Field(default=1, ge=0, le=12)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    retrieval_memory_size: int = Field(
        default=256, ge=0, le=100_000, description="training clips kept for retrieval augmentation; 0 disables it"
    )
    retrieval_temperature: float = Field(default=0.03, gt=0.0, le=1.0, description="of the attention to them, in cosines")


class MLPDenoiserConfig(StageConfig):
    """MLP over all latents."""

    hidden_dim: int = Field(default=1024, ge=16, le=16384)
    num_blocks: int = Field(default=3, ge=1, le=64)


class UNetConfig(StageConfig):
    """diffusers' UNet2DConditionModel."""

    block_out_channels: tuple[int, ...] = Field(
        default=(96, 192), min_length=1, max_length=4, description="channels per level; multiples of 16"
    )
    attention_head_dim: int = Field(default=32, ge=4, le=256, description="channels per attention head")

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        if any(width <= 0 or width % 16 for width in self.block_out_channels):
            raise ValueError("block_out_channels must be positive multiples of 16 (group normalization)")
        return self


class ObjectiveConfig(StageConfig):
    """Training objective."""

    prediction_type: Literal["residual", "velocity"] = Field(
        default="residual",
        description="residual: MLP and U-Net predict what the Gaussian prior leaves; velocity: the U-Net alone",
    )
    full_covariance_channels: int = Field(
        default=12, ge=1, le=64, description="residual: latent channels with a full covariance in the Gaussian prior"
    )
    logit_mean: float = Field(default=0.5, ge=-5.0, le=5.0, description="mean of the logit of time; above 0: more noise")
    logit_std: float = Field(default=1.0, gt=0.0, le=5.0, description="standard deviation of the logit of time")
    conditioning_dropout_prob: float = Field(
        default=0.15, ge=0.0, lt=1.0, description="probability that a sample is trained without audio"
    )


class ScratchPhases(StageConfig):
    """Phases of training."""

    mlp: PhaseConfig = Field(
        default=PhaseConfig(max_steps=1500, batch_size=128, learning_rate=1e-3), description="first the MLP alone"
    )
    unet: PhaseConfig = Field(
        default=PhaseConfig(max_steps=200, batch_size=16, learning_rate=1e-3), description="then the U-Net on the residual"
    )

    @model_validator(mode="after")
    def _check(self) -> ScratchPhases:
        if self.mlp.max_steps + self.unet.max_steps < 1:
            raise ValueError("mlp.max_steps and unet.max_steps are both 0")
        return self


class ScratchConfig(RecipeConfig):
    """Recipe `scratch`: a small model trained on the pairs alone."""

    autoencoder: AutoencoderConfig = AutoencoderConfig()
    conditioner: ConditionerConfig = ConditionerConfig()
    mlp_denoiser: MLPDenoiserConfig = MLPDenoiserConfig()
    unet: UNetConfig = UNetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    phases: ScratchPhases = ScratchPhases()

    @property
    def training_phases(self) -> Mapping[str, PhaseConfig]:
        """Phases in their order."""
        return {"mlp": self.phases.mlp, "unet": self.phases.unet}

    @model_validator(mode="after")
    def _check(self) -> ScratchConfig:
        if self.objective.full_covariance_channels > self.autoencoder.latent_channels:
            raise ValueError(
                f"objective.full_covariance_channels must not exceed autoencoder.latent_channels "
                f"({self.autoencoder.latent_channels})"
            )
        if self.objective.prediction_type == "velocity" and self.phases.mlp.max_steps:
            raise ValueError("objective.prediction_type velocity does not use the MLP; set phases.mlp.max_steps to 0")
        return self

    def check(
        self,
        resolution: int,
        audio: AudioEncodingConfig,
        image_augmentation: ImageAugmentationConfig,
        sampling: SamplingConfig,
    ) -> None:
        """Check encoder, scheduler and resolution.

        Raises:
            ValueError: a combination of keys is not supported.
        """
        if audio.encoder != "yamnet":
            raise ValueError(f"audio.encoder {audio.encoder} is not supported by recipe scratch; set it to yamnet")
        if sampling.scheduler not in ("auto", "euler"):
            raise ValueError(f"sampling.scheduler {sampling.scheduler} is not supported by recipe scratch; set it to euler")
        side, levels = resolution // 8, len(self.unet.block_out_channels)
        if side % 2 ** (levels - 1):
            raise ValueError(f"resolution {resolution} gives {side} x {side} latents, too few for {levels} levels of the U-Net")
