"""Parameters of the `ingest` stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig

Filter = dict[str, str | list[str]]
"""Column -> value, or values, of the rows to select. All columns must match."""


PoolName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
"""Name of a pool: the first part of the paths of its files in every table."""


class MetadataColumnsConfig(StageConfig):
    """Columns of the metadata table. Several columns are joined, e.g. `[package, source]`. No other column is read.

    Known layouts have columns of their own; there, only `text` is used.
    """

    file: str = Field(default="file", min_length=1, description="path of the file, relative to `root`")
    license: str | None = Field(default=None, description="SPDX id")
    author: str | None = Field(default=None, description="author to credit")
    source: str | list[str] | None = Field(default=None, description="origin; several columns are joined by /")
    group: str | list[str] | None = Field(default=None, description="rows with equal values stay in one split")
    text: str | list[str] | None = Field(
        default=None,
        description="words that came with a file (caption, title, tags), joined by `; `; also keys of known layouts",
    )


class ImageConfig(StageConfig):
    """Limits and normal form of images."""

    max_side: int = Field(default=256, ge=16, le=4096, description="px, longer side of the stored copy; never enlarged")
    min_side: int = Field(default=16, ge=1, le=4096, description="px, shorter side of the original")
    max_aspect: float = Field(default=10.0, ge=1, le=1000, description="largest accepted ratio of longer to shorter side")
    max_megapixels: float = Field(
        default=50.0, gt=0, le=1000, description="largest accepted image, 10^6 px, read from the header before decoding"
    )
    max_file_mb: float = Field(default=100.0, gt=0, le=4096, description="largest accepted file, 10^6 bytes")
    animated: Literal["first", "refuse"] = Field(default="first", description="several frames: use the first, or quarantine")
    phash_distance: int = Field(default=4, ge=-1, le=8, description="bits of 64 within which images group; -1 disables")

    @property
    def max_file_bytes(self) -> float:
        return self.max_file_mb * 1e6


class AudioConfig(StageConfig):
    """Limits of audio. The normal form is fixed: mono, 48 kHz, 16-bit FLAC."""

    min_seconds: float = Field(default=0.1, ge=0.01, le=60, description="shortest accepted clip")
    max_seconds: float = Field(default=60.0, gt=0, le=3600, description="longest accepted clip")
    min_lufs: float = Field(default=-70.0, ge=-70, le=-20, description="loudness at or below which a clip abstains")

    @model_validator(mode="after")
    def _check_order(self) -> AudioConfig:
        if self.min_seconds >= self.max_seconds:
            raise ValueError("min_seconds must be below max_seconds")
        return self


class DecoderLimitsConfig(StageConfig):
    """Limits of the decoding processes. They bound hostile files and do not change results."""

    workers: int = Field(default=0, ge=0, le=256, description="processes; 0 is one per core")
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600, description="time limit of a file")
    memory_mb: int = Field(default=2048, ge=512, le=65536, description="address space of one process, 10^6 bytes")


class SourceConfig(StageConfig):
    """A folder of raw media and how to read it."""

    root: str | None = Field(default=None, min_length=1, description="folder with the files; relative to the project")
    layout: Literal["auto", "table", "files", "webdataset", "datasets", "parquet", "fsd50k", "audioset", "esc50", "coco"] = (
        Field(default="auto", description="auto: `metadata` if set, else a known layout, else all files below `root`")
    )
    metadata: str | None = Field(
        default=None,
        min_length=1,
        description="CSV or Parquet, inside `root` or an absolute path; null: all files",
    )
    columns: MetadataColumnsConfig = MetadataColumnsConfig()
    pool: Filter | None = Field(default=None, description="rows to pair and train on; null: all that are not held out")
    holdout: Filter | None = Field(default=None, description="rows used for evaluation only")


SOURCE_KEYS = frozenset(SourceConfig.model_fields)


class PoolConfig(SourceConfig):
    """A named pool."""

    root: str = Field(min_length=1, description="folder with the files; relative to the project")
    kind: Literal["images", "audio", "mixed"] = Field(default="mixed", description="files of the other kind are skipped")
    license: str | None = Field(default=None, min_length=1, description="SPDX id of files whose source states no license")
    role: Literal["pool", "holdout"] = Field(default="pool", description="holdout: every file is used for evaluation only")


class IngestConfig(SourceConfig):
    """Sources, limits and normal form of the raw media. The sources are either one `root` or the named `pools`."""

    pools: dict[PoolName, PoolConfig] = Field(default={}, max_length=100, description="sources by name, instead of `root`")
    link_roots: list[str] = Field(
        default=[], max_length=100, description="folders outside the sources into which links of files may lead"
    )
    image: ImageConfig = ImageConfig()
    audio: AudioConfig = AudioConfig()
    decoder: DecoderLimitsConfig = DecoderLimitsConfig()
    max_failed_fraction: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="quarantined fraction above which the stage fails; up to 5 files pass, of at most half; 0: none",
    )
    shard_prefix_digits: int = Field(default=1, ge=1, le=4, description="hex digits per shard name: 16^n shards per kind")

    @model_validator(mode="after")
    def _check_one_form(self) -> IngestConfig:
        both = [name for name in sorted(SOURCE_KEYS & self.model_fields_set) if getattr(self, name) is not None]
        if self.pools and both:
            raise ValueError(f"{both[0]} belongs to the form with one root; with pools, set it in each pool, not beside them")
        return self
