"""Configuration of stage `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline_steps.core.config import StageConfig
from pipeline_steps.core.registry import Registry
from pipeline_steps.evaluate.judges.base import AUDIO_JUDGES, IMAGE_JUDGES, Judge

AbilityName = Literal["semantic_mixing", "interpolation", "loudness", "acoustic_space", "words_and_sound"]
GainDb = Annotated[float, Field(ge=-60, le=24)]


class JudgeCheckpointConfig(StageConfig):
    """Weights of one judge."""

    model: str = Field(default="", max_length=500, description="hub id or local folder")
    revision: str = Field(
        default="", max_length=64, description="commit (40 hex digits) of a hub id; sha256 (64) of a folder, checked when given"
    )


class JudgeCheckpointsConfig(StageConfig):
    """Weights of judges by name of the judge, and where they compute."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, JudgeCheckpointConfig] = Field(init=False)

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="device of the judges; auto: a GPU if there is one"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32", description="precision of the judges; auto: bfloat16 on a GPU"
    )

    def get(self, name: str) -> JudgeCheckpointConfig:
        """Weights of judge `name`; empty if there is no entry."""
        return self.__pydantic_extra__.get(name, JudgeCheckpointConfig())

    @model_validator(mode="after")
    def _names_are_registered(self) -> JudgeCheckpointsConfig:
        for name in self.__pydantic_extra__:
            if name not in IMAGE_JUDGES and name not in AUDIO_JUDGES:
                known = ", ".join([*IMAGE_JUDGES.names(), *AUDIO_JUDGES.names()])
                raise ValueError(f"{name} is neither an option nor a judge; choose one of device, dtype, {known}")
        return self


class GainSensitivityConfig(StageConfig):
    """Images generated from the same clips at other gains."""

    num_clips: int = Field(default=8, ge=0, le=1000, description="clips of the measurement; 0 skips it")
    gains_db: Annotated[list[GainDb], Field(max_length=8)] = Field(
        default=[-12.0, 6.0], description="gains compared with 0 dB; an empty list skips the measurement"
    )


class AbilitiesConfig(StageConfig):
    """Sweeps of one property of the audio: whether the images follow."""

    names: Annotated[list[AbilityName], Field(max_length=5)] = Field(
        default=["semantic_mixing", "interpolation", "loudness", "acoustic_space", "words_and_sound"],
        description="abilities measured; an empty list skips them",
    )
    num_clips: int = Field(default=6, ge=3, le=1000, description="held-out clips, or pairs of clips, per ability")
    num_samples: int = Field(default=2, ge=1, le=64, description="noise seeds per clip and point of a sweep")


class ReportConfig(StageConfig):
    """Limits of the HTML report."""

    max_pairs: int = Field(default=60, ge=0, le=2000, description="pairs shown: best, weakest and random ones")
    max_samples: int = Field(default=130, ge=0, le=2000, description="clips shown with the images generated from them, per set")
    max_table_rows: int = Field(
        default=300, ge=1, le=100_000, description="rows of the tables of abstained and quarantined items"
    )


class EvaluateConfig(StageConfig):
    """Section `evaluate` of `params.yaml`."""

    registries: ClassVar[Mapping[str, Registry[Any]]] = {"image_judges": IMAGE_JUDGES, "audio_judge": AUDIO_JUDGES}

    ground_truth: str | None = Field(
        None, min_length=1, max_length=1000, description="CSV of labels and true pairs; null: there is no ground truth"
    )
    samples_per_audio: int = Field(4, ge=1, le=64, description="images generated from each clip")
    unconditional_samples: int = Field(64, ge=4, le=10_000, description="images generated without audio")
    guidance_scale: float | None = Field(None, ge=0, le=30, description="classifier-free guidance; null: the model's default")
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="sampling steps; null: the model's default")
    max_test_pairs: int = Field(200, ge=2, le=100_000, description="test pairs evaluated; more are subsampled by pair id")
    image_judges: list[str] = Field(
        ["ssd_mobilenet_v2"], min_length=1, max_length=16, description="image judges; the first gives the headline numbers"
    )
    judge_checkpoints: JudgeCheckpointsConfig = Field(
        JudgeCheckpointsConfig(), description="weights of the judges that the stage `assets` does not provide"
    )
    audio_judge: str = Field("aisfx", description="audio encoder of the audio-image agreement")
    allow_shared_family: bool = Field(
        False, description="accept and flag a judge whose family captioned, retrieved or conditioned; false: an error"
    )
    num_calibration_images: int = Field(
        400, ge=3, le=100_000, description="real images outside the test that calibrate a judge"
    )
    judge_shrinkage: float = Field(1.0, gt=0, le=1000, description="shrinkage of a judge's within-class covariance")
    density_k: int = Field(5, ge=1, le=100, description="neighbors of density and coverage")
    num_bootstrap: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples of each 95 % interval")
    min_clusters: int = Field(30, ge=2, le=10_000, description="independent clips below which a set gets a warning")
    memorisation_images: int = Field(
        2000, ge=1, le=1_000_000, description="training images compared with generated ones; more are subsampled by the seed"
    )
    gain_sensitivity: GainSensitivityConfig = GainSensitivityConfig()
    abilities: AbilitiesConfig = AbilitiesConfig()
    report: ReportConfig = ReportConfig()
    batch_size: int = Field(32, ge=1, le=4096, description="items per part of the result cache")
    num_threads: int = Field(0, ge=0, le=256, description="CPU threads; 0: one per core")
    cache_dir: str = Field("", max_length=1000, description="folder or fsspec URL of the result cache; empty: .cache/items")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random in the stage")

    @model_validator(mode="after")
    def _judges_are_usable(self) -> EvaluateConfig:
        if len(set(self.image_judges)) < len(self.image_judges):
            raise ValueError(f"image_judges {self.image_judges} names a judge twice")
        judges: list[tuple[str, type[Judge]]] = [(name, IMAGE_JUDGES.get(name)) for name in self.image_judges]
        for name, judge in [*judges, (self.audio_judge, AUDIO_JUDGES.get(self.audio_judge))]:
            if judge.requires_checkpoint and not self.judge_checkpoints.get(name).model:
                raise ValueError(f"judge {name} needs judge_checkpoints.{name}.model, a hub id or a folder")
        return self
