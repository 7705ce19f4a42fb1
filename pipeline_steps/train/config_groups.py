"""Groups of section `train` that every recipe uses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline_steps.core.config import StageConfig


class AstConfig(StageConfig):
    """Encoder `ast`: an Audio Spectrogram Transformer."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: bfloat16 on GPU")


class AudioEncodingConfig(StageConfig):
    """Audio encoder and audio augmentation."""

    encoder: Literal["yamnet", "ast"] = Field(default="yamnet", description="pretrained encoder: YAMNet or an AST")
    ast: AstConfig = AstConfig()
    max_seconds: float = Field(default=10.0, ge=2.0, le=60.0, description="seconds from the start of a clip that are encoded")
    pool_time: int = Field(default=1, ge=1, le=64, description="consecutive time steps whose tokens are averaged; 1: none")
    pool_bands: int = Field(default=1, ge=1, le=64, description="neighboring bands whose tokens are averaged; 1: none")
    num_augmentations: int = Field(
        default=4, ge=1, le=64, description="stored versions of each clip; the first is the clip itself"
    )
    max_log_speed: float = Field(default=0.12, ge=0.0, le=0.5, description="largest change of speed and pitch, as a logarithm")
    max_gain_db: float = Field(default=9.0, ge=0.0, le=40.0, description="largest change of level")
    noise_prob: float = Field(default=0.5, ge=0.0, le=1.0, description="probability of added noise, 8 to 30 dB below the clip")
    mix_prob: float = Field(default=0.3, ge=0.0, le=1.0, description="probability of another clip mixed in, 10 to 20 dB below")
    reverb_prob: float = Field(
        default=0.0, ge=0.0, le=1.0, description="probability of reverberation; above 0 requires the extra reverb"
    )

    def augmentation_identity(self) -> dict[str, Any]:
        """Parameters that determine an augmentation, for the cache fingerprint.

        The names are those of earlier versions, so that cached features stay valid. `reverb_share` is left out at 0.
        """
        identity = {
            "max_seconds": self.max_seconds,
            "speed": self.max_log_speed,
            "gain_db": self.max_gain_db,
            "noise_share": self.noise_prob,
            "mix_share": self.mix_prob,
        }
        return identity | ({"reverb_share": self.reverb_prob} if self.reverb_prob else {})


class ImageAugmentationConfig(StageConfig):
    """Augmentation of training images."""

    hflip_prob: float = Field(default=0.0, ge=0.0, le=1.0, description="probability of a horizontal flip")


class SceneConfig(StageConfig):
    """Scenes composed from training pairs: their images on one ground, and the mixture of their clips."""

    fraction: float = Field(default=0.0, ge=0.0, le=10.0, description="composed scenes per training pair; 0: none")
    max_things: int = Field(default=2, ge=2, le=4, description="largest number of images in a scene; the smallest is 2")
    max_level_db: float = Field(
        default=12.0, ge=0.0, le=24.0, description="largest level of a clip below the first; 6 dB halve the side of its image"
    )
    room_prob: float = Field(
        default=0.0, ge=0.0, le=1.0, description="probability of a room, which darkens the ground and reverberates the clips"
    )


class PhaseConfig(StageConfig):
    """Phase of training."""

    max_steps: int = Field(default=200, ge=1, le=10_000_000, description="optimizer steps")
    batch_size: int = Field(default=16, ge=1, le=65_536, description="samples per optimizer step")
    learning_rate: float = Field(default=5e-5, gt=0.0, le=0.1, description="highest learning rate, after the warmup")


class OptimizerConfig(StageConfig):
    """AdamW (fused) with linear warmup and cosine decay."""

    lr_warmup_steps: int = Field(default=30, ge=0, description="warmup steps")
    min_lr_ratio: float = Field(default=0.02, ge=0.0, le=1.0, description="final learning rate, as a fraction of the highest")
    weight_decay: float = Field(default=0.01, ge=0.0, le=1.0, description="weight decay of AdamW")
    max_grad_norm: float = Field(default=1.0, gt=0.0, description="gradients are clipped to this norm")
    ema_decay: float = Field(default=0.995, ge=0.0, lt=1.0, description="decay of the averaged weights per step")


class SamplingConfig(StageConfig):
    """Default sampling parameters, saved with the model."""

    scheduler: Literal["auto", "dpm++", "ddim"] = Field(default="auto", description="auto: dpm++ (DPM-Solver++)")
    num_inference_steps: int = Field(default=16, ge=1, le=1000, description="sampling steps")
    guidance_scale: float = Field(
        default=3.0, ge=0.0, le=50.0, description="classifier-free guidance; 1: none, 0 ignores the audio"
    )


class PerformanceConfig(StageConfig):
    """Use of the hardware. Batch sizes are those of an optimizer step, split among processes and microbatches."""

    compile: bool | Literal["auto"] = Field(default="auto", description="torch.compile of the U-Net; auto: on a GPU")
    channels_last: bool | Literal["auto"] = Field(default="auto", description="memory format of the U-Net; auto: on a GPU")
    accumulate_grad_batches: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        default=1,
        description="microbatches of an optimizer step: less memory, same result; auto: the fewest that fit into GPU memory",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations of the U-Net in the backward pass: less memory, more time"
    )
    devices: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default=1, description="processes per machine, one per GPU; auto: every GPU"
    )
    num_nodes: int = Field(default=1, ge=1, le=65_536, description="machines")
    strategy: Literal["auto", "ddp"] = Field(default="auto", description="auto: ddp for several processes")
    num_workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = Field(
        default="auto", description="worker processes of the DataLoader; auto: 2 on a GPU, else 0"
    )
    prefetch_factor: int = Field(default=2, ge=1, le=64, description="batches that each worker prepares ahead")
    pin_memory: bool | Literal["auto"] = Field(default="auto", description="batches in pinned memory; auto: on a GPU")
