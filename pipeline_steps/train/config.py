"""Section `train` of params.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline_steps.core.config import StageConfig


class ConfigGroup(BaseModel):
    """A nested group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AutoencoderConfig(ConfigGroup):
    """Pictures <-> latents."""

    kind: Literal["patch", "tiny"] = Field(
        default="patch", description="patch: principal components + refiner; tiny: AutoencoderTiny"
    )
    channels: int = Field(default=24, ge=1, le=192, description="latent channels")
    whitening: float = Field(
        default=0.25, ge=0.0, le=1.0, description="patch: exponent that flattens the spectrum of the latents"
    )
    width: int = Field(
        default=32, ge=0, le=256, multiple_of=8, description="channels of the refiner (0: none) or of the autoencoder"
    )
    steps: int = Field(default=300, ge=0, le=100_000, description="gradient steps of the refiner or the autoencoder")
    batch_size: int = Field(default=16, ge=1, le=1024)
    learning_rate: float = Field(default=2e-3, gt=0.0, le=0.1)
    latent_noise: float = Field(
        default=0.25, ge=0.0, le=2.0, description="largest noise on the latents that the decoder learns to undo"
    )


class AstConfig(ConfigGroup):
    """Encoder `ast`: an Audio Spectrogram Transformer."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="auto: bfloat16 on GPU")


class AudioEncodingConfig(ConfigGroup):
    """How sounds are heard, and the views of each that training sees."""

    encoder: Literal["yamnet", "ast"] = Field(
        default="yamnet", description="what hears: YAMNet's feature map, or (recipe adapter) patches of an AST"
    )
    ast: AstConfig = AstConfig()
    max_seconds: float = Field(default=10.0, ge=2.0, le=60.0, description="seconds from the start that are heard")
    views: int = Field(default=4, ge=1, le=64, description="versions of each sound; the first is the sound itself")
    speed: float = Field(default=0.12, ge=0.0, le=0.5, description="largest change of speed and pitch, as a logarithm")
    gain_db: float = Field(default=9.0, ge=0.0, le=40.0, description="largest change of level, both ways")
    noise_share: float = Field(
        default=0.5, ge=0.0, le=1.0, description="share of views with noise at 8 to 30 dB below the sound"
    )
    mix_share: float = Field(default=0.3, ge=0.0, le=1.0, description="share of views with another sound 10 to 20 dB below")
    reverb_share: float = Field(
        default=0.0, ge=0.0, le=1.0, description="share of views heard in a room; above 0 needs the extra reverb"
    )

    def identity(self) -> dict[str, Any]:
        """What shapes a view, for the memo's fingerprint; without a room, as before there were rooms."""
        apart = {"views", "encoder", "ast"}
        return self.model_dump(mode="json", exclude=apart if self.reverb_share else apart | {"reverb_share"})


class ImageAugmentationConfig(ConfigGroup):
    """The views of each picture that training sees."""

    mirror: float = Field(default=0.0, ge=0.0, le=1.0, description="share that is mirrored")
    scale: float = Field(default=0.0, ge=0.0, le=0.5, description="largest change of size, as a logarithm")
    shift: float = Field(default=0.0, ge=0.0, le=0.5, description="largest move, as a share of the side")


class BackboneConfig(ConfigGroup):
    """Recipe adapter: the frozen text-to-image model, any Stable Diffusion 1.x or 2.x in the diffusers layout."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )
    prompt: str = Field(default="", max_length=1000, description="text beside every sound, if the backbone reads text")


class ResamplerConfig(ConfigGroup):
    """Recipe adapter: encoder tokens of any number -> a few for cross-attention."""

    count: int = Field(default=16, ge=1, le=256, description="tokens that the U-Net attends to")
    inner: int = Field(default=512, ge=16, le=4096, multiple_of=2, description="width inside")
    depth: int = Field(default=4, ge=1, le=24)
    heads: int = Field(default=8, ge=1, le=64, description="divides inner")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="of attention weights")

    @model_validator(mode="after")
    def _heads(self) -> ResamplerConfig:
        if self.inner % self.heads:
            raise ValueError(f"inner {self.inner} is not a multiple of heads {self.heads}")
        return self


class ConditionerConfig(ConfigGroup):
    """Sound features -> tokens."""

    frames: int = Field(default=8, ge=1, le=128, description="time tokens")
    frame_components: int = Field(default=64, ge=1, le=1024, description="principal components kept of YAMNet's 1024-d frames")
    tag_components: int = Field(default=64, ge=1, le=521, description="principal components kept of the tag logits")
    width: int = Field(default=192, ge=16, le=2048, multiple_of=16, description="of the tokens")
    layers: int = Field(default=1, ge=0, le=12)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    memory: int = Field(
        default=256, ge=0, le=100_000, description="most training sounds in which a sound is expressed; 0: heard as it is"
    )
    memory_temperature: float = Field(default=0.03, gt=0.0, le=1.0, description="of the attention to them, in cosines")


class UNetConfig(ConfigGroup):
    """diffusers' UNet2DConditionModel."""

    widths: tuple[int, ...] = Field(
        default=(96, 192), min_length=1, max_length=4, description="channels by level; multiples of 16"
    )
    head_width: int = Field(default=32, ge=4, le=256, description="channels of an attention head")

    @model_validator(mode="after")
    def _multiples(self) -> UNetConfig:
        if any(width <= 0 or width % 16 for width in self.widths):
            raise ValueError("widths must be positive multiples of 16 (group normalisation)")
        return self


class ObjectiveConfig(ConfigGroup):
    """What is learned."""

    prediction: Literal["residual", "velocity"] = Field(
        default="residual",
        description="residual: what a Gaussian guess leaves, by composer and U-Net; velocity: by the U-Net alone",
    )
    coarse_channels: int = Field(
        default=12, ge=1, le=64, description="residual: latent channels whose full covariance the Gaussian guess knows"
    )
    time_mean: float = Field(default=0.5, ge=-5.0, le=5.0, description="mean of the logit of time; above 0 more noise")
    time_std: float = Field(default=1.0, gt=0.0, le=5.0)
    condition_dropout: float = Field(default=0.15, ge=0.0, lt=1.0, description="share of samples drawn without their sound")
    min_snr: float = Field(
        default=5.0,
        gt=0.0,
        le=1000.0,
        description="adapter: signal-to-noise ratio above which a time counts less (min-SNR-gamma)",
    )


class MLPDenoiserConfig(ConfigGroup):
    """The MLP over all latents."""

    width: int = Field(default=1024, ge=16, le=16384)
    blocks: int = Field(default=3, ge=1, le=64)


class PhaseConfig(ConfigGroup):
    """One phase of training."""

    steps: int = Field(ge=0, le=10_000_000)
    batch_size: int = Field(ge=1, le=65_536)
    learning_rate: float = Field(gt=0.0, le=0.1, description="the highest, after the warm-up")


class OptimizerConfig(ConfigGroup):
    """AdamW (fused) with warm-up and cosine decay in each phase. The steps define the run, never a clock."""

    compose: PhaseConfig = Field(
        default=PhaseConfig(steps=1500, batch_size=128, learning_rate=1e-3), description="first the composer alone"
    )
    refine: PhaseConfig = Field(
        default=PhaseConfig(steps=200, batch_size=16, learning_rate=1e-3), description="then the U-Net on what is left"
    )
    adapt: PhaseConfig = Field(
        default=PhaseConfig(steps=20_000, batch_size=16, learning_rate=1e-4), description="recipe adapter: its only phase"
    )
    warmup_steps: int = Field(default=30, ge=0, description="of each phase")
    final_share: float = Field(default=0.02, ge=0.0, le=1.0, description="learning rate at the end, as a share of the highest")
    weight_decay: float = Field(default=0.01, ge=0.0, le=1.0)
    gradient_clip: float = Field(default=1.0, gt=0.0)
    ema_decay: float = Field(default=0.995, ge=0.0, lt=1.0)

    @property
    def max_steps(self) -> int:
        """Steps of both phases."""
        return self.compose.steps + self.refine.steps

    @model_validator(mode="after")
    def _some(self) -> OptimizerConfig:
        if self.max_steps < 1:
            raise ValueError("compose.steps and refine.steps are both 0")
        return self


class SamplingConfig(ConfigGroup):
    """Defaults stored with the model."""

    solver: Literal["auto", "euler", "dpm++", "ddim"] = Field(
        default="auto", description="auto: euler for scratch, dpm++ (DPM-Solver++) for adapter, which may take ddim as well"
    )
    steps: int = Field(default=12, ge=1, le=1000)
    guidance_scale: float = Field(default=3.0, ge=0.0, le=50.0)
    shift: float = Field(default=3.0, ge=0.1, le=100.0, description="euler: above 1 more of the steps go to high noise")


class PerformanceConfig(ConfigGroup):
    """How the run uses its hardware. Batch sizes stay those of an optimiser step: processes and microbatches share them."""

    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile; auto: on a GPU, if timing a few steps shows that it pays over the run"
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        default="auto", description="pictures as height, width, channels in memory; auto: on a GPU"
    )
    accumulate: int = Field(default=1, ge=1, le=4096, description="microbatches of an optimiser step: less memory, same result")
    gradient_checkpointing: bool = Field(
        default=False, description="compute activations of the U-Net again in the backward pass: less memory, more time"
    )
    devices: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = Field(
        default=1, description="processes on each machine, one a GPU; auto: every GPU"
    )
    num_nodes: int = Field(default=1, ge=1, le=65_536, description="machines")
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        default="auto", description="ddp: each process holds the model; fsdp: it is cut among them; auto: ddp for several"
    )
    ahead: int = Field(default=2, ge=1, le=64, description="batches prepared ahead, on a GPU")

    @model_validator(mode="after")
    def _together(self) -> PerformanceConfig:
        if self.strategy == "fsdp" and self.compile == "on":
            raise ValueError("speed.compile on and speed.strategy fsdp do not go together: set compile to auto or off")
        return self


class TrainConfig(StageConfig):
    """Train an audio -> picture latent diffusion model, from scratch or as an adapter of a pretrained one."""

    recipe: Literal["scratch", "adapter"] = Field(
        default="scratch", description="scratch: a small model on the pairs alone; adapter: audio for a frozen Stable Diffusion"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto takes a GPU if there is one")
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        default="auto", description="auto: 32-true on CPU, bf16-mixed on GPU"
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads; 0 leaves torch's choice")
    picture_size: int = Field(default=64, ge=16, le=1024, multiple_of=16, description="px, side of drawn pictures")
    codec: AutoencoderConfig = AutoencoderConfig()
    sound: AudioEncodingConfig = AudioEncodingConfig()
    picture: ImageAugmentationConfig = ImageAugmentationConfig()
    backbone: BackboneConfig = BackboneConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    conditioner: ConditionerConfig = ConditionerConfig()
    composer: MLPDenoiserConfig = MLPDenoiserConfig()
    unet: UNetConfig = UNetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimiser: OptimizerConfig = OptimizerConfig()
    drawing: SamplingConfig = SamplingConfig()
    speed: PerformanceConfig = PerformanceConfig()
    checkpoint_every: int = Field(default=250, ge=1, description="steps between resumable checkpoints")
    sample_every: int = Field(default=250, ge=1, description="steps between sample grids and validation losses")
    max_bad_steps: int = Field(
        default=3, ge=1, le=1000, description="consecutive steps with a loss that is not finite before it stops"
    )
    resume_from: str | None = Field(default=None, description="checkpoint to go on from; null: the run's own, if it has one")

    @property
    def max_steps(self) -> int:
        """Steps of the recipe."""
        return self.optimiser.adapt.steps if self.recipe == "adapter" else self.optimiser.max_steps

    @model_validator(mode="after")
    def _recipe(self) -> TrainConfig:
        if self.sound.encoder == "ast" and not self.sound.ast.model:
            raise ValueError("sound.encoder ast needs sound.ast.model, a hub id or a folder")
        if self.recipe == "scratch":
            if self.sound.encoder == "ast":
                raise ValueError("sound.encoder ast needs recipe adapter: scratch is fitted on YAMNet's frames and tag logits")
            if self.drawing.solver not in ("auto", "euler"):
                raise ValueError(
                    f"drawing.solver {self.drawing.solver} needs recipe adapter: scratch learns a flow, drawn by euler"
                )
            return self
        if not self.backbone.model:
            raise ValueError("recipe adapter needs backbone.model, a hub id or a folder")
        if self.drawing.solver == "euler":
            raise ValueError("drawing.solver euler draws the flow of scratch: choose dpm++ or ddim for recipe adapter")
        if self.picture.scale or self.picture.shift:
            raise ValueError(
                "picture.scale and picture.shift must be 0 for recipe adapter: latents are computed once (mirror may be set)"
            )
        if not self.optimiser.adapt.steps:
            raise ValueError("optimiser.adapt.steps is 0")
        return self

    @model_validator(mode="after")
    def _sizes(self) -> TrainConfig:
        if self.recipe == "adapter":
            return self
        side = self.picture_size // 8
        if side % 2 ** (len(self.unet.widths) - 1):
            raise ValueError(
                f"picture_size {self.picture_size} gives {side} x {side} latents: too few for {len(self.unet.widths)} levels"
            )
        if self.objective.coarse_channels > self.codec.channels:
            raise ValueError(f"objective.coarse_channels must not exceed codec.channels ({self.codec.channels})")
        if self.objective.prediction == "velocity" and self.optimiser.compose.steps:
            raise ValueError("objective.prediction velocity has no composer: set optimiser.compose.steps to 0")
        if self.codec.kind == "tiny" and self.codec.width == 0:
            raise ValueError("codec.width must be at least 8 for kind tiny")
        return self
