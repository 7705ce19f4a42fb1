"""Parameters of the evaluate stage. The defaults are the embedded preset."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig

PictureJudgeName = Literal["ssd_mobilenet_v2", "augnet", "efficientnet_lite0", "dinov2", "clip", "inception", "inception_v3"]
Gain = Annotated[float, Field(ge=-60, le=24)]


class JudgeCheckpointConfig(StageConfig):
    """Weights of a judge that is not embedded."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 of a folder (64), checked when given"
    )


class JudgeCheckpointsConfig(StageConfig):
    """Judges by hub id or folder; each needs its weights only if `picture_judges` names it."""

    dinov2: JudgeCheckpointConfig = Field(default=JudgeCheckpointConfig(), description="a DINOv2 of transformers")
    clip: JudgeCheckpointConfig = Field(
        default=JudgeCheckpointConfig(), description="a CLIP of transformers, or its image tower"
    )
    inception: JudgeCheckpointConfig = Field(
        default=JudgeCheckpointConfig(), description="the network of FID, with 1008 classes"
    )
    inception_v3: JudgeCheckpointConfig = Field(
        default=JudgeCheckpointConfig(), description="the ImageNet network of torchvision and timm; not FID's"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bfloat16", "auto"] = Field(default="float32", description="auto: bfloat16 on GPU")


class EvaluateConfig(StageConfig):
    """Section `evaluate` of `params.yaml`."""

    gold: str = Field(
        "data/demo/manifest.csv",
        min_length=1,
        max_length=1000,
        description="CSV of ground-truth labels and true pairs; a header without rows means there is none",
    )
    samples_per_sound: int = Field(4, ge=1, le=64, description="pictures drawn from each sound")
    unconditional_samples: int = Field(64, ge=4, le=10_000, description="pictures drawn without a sound")
    guidance_scale: float | None = Field(None, ge=0, le=30, description="classifier-free guidance; null: as the model says")
    steps: int | None = Field(None, ge=1, le=1000, description="sampling steps; null: as the model says")
    max_test_pairs: int = Field(200, ge=2, le=100_000, description="test pairs drawn; more are thinned evenly by pair id")
    picture_judges: Annotated[list[PictureJudgeName], Field(min_length=1, max_length=7)] = Field(
        default=["ssd_mobilenet_v2"], description="the first one gives the headline numbers"
    )
    checkpoints: JudgeCheckpointsConfig = Field(
        default=JudgeCheckpointsConfig(), description="weights of the judges that are not embedded"
    )
    sound_judge: Literal["aisfx"] = Field("aisfx", description="sound side of the audio-image judge")
    allow_shared_family: bool = Field(
        False, description="flag a judge whose family captioned, retrieved or conditioned instead of refusing it"
    )
    reference_pictures: int = Field(400, ge=3, le=100_000, description="real pictures outside the test that calibrate a judge")
    judge_shrinkage: float = Field(1.0, gt=0, le=1000, description="shrinkage of a judge's within-class covariance")
    density_neighbours: int = Field(5, ge=1, le=100, description="k of density and coverage")
    bootstrap_repeats: int = Field(2000, ge=100, le=100_000, description="resamples behind each 95 % interval")
    small_sample: int = Field(30, ge=2, le=10_000, description="fewer independent clusters than this raises a warning")
    sensitivity_sounds: int = Field(8, ge=0, le=1000, description="sounds drawn again at other gains; 0 skips the section")
    sensitivity_gains_db: Annotated[list[Gain], Field(max_length=8)] = Field(
        default=[-12.0, 6.0], description="gains compared with 0 dB"
    )
    gallery_pairs: int = Field(60, ge=0, le=2000, description="pairs shown in the report: best, weakest and random ones")
    gallery_draws: int = Field(130, ge=0, le=2000, description="sounds whose drawings are shown in the report")
    table_rows: int = Field(300, ge=1, le=100_000, description="rows shown of a table of abstentions or quarantines")
    batch_size: int = Field(32, ge=1, le=4096, description="items per memo part")
    threads: int = Field(0, ge=0, le=256, description="CPU threads of the networks; 0: one per core")
    cache_dir: str = Field("", max_length=1000, description="folder or fsspec URL of the memo; empty: .cache/items")
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _judges(self) -> EvaluateConfig:
        if len(set(self.picture_judges)) < len(self.picture_judges):
            raise ValueError("picture_judges names a judge twice")
        for name in self.picture_judges:
            given = getattr(self.checkpoints, name, None)
            if given is not None and not given.model:
                raise ValueError(f"picture judge {name} needs checkpoints.{name}.model, a hub id or a folder")
        return self
