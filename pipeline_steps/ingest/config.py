"""Section `ingest` of params.yaml."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline_steps.core.config import StageConfig

Filter = dict[str, str | list[str]]
"""Column name -> the value, or values, a row must have there. All columns must match."""

POOL: Filter = {"split": "pool"}
HOLDOUT: Filter = {"split": "gold"}


class MetadataColumnsConfig(StageConfig):
    """Names of columns in the metadata table. A list is joined: `[package, source]`. No other column is read."""

    file: str = Field(default="file", min_length=1, description="path of the file, relative to `root`")
    license: str | None = Field(default="licence", description="SPDX id")
    author: str | None = Field(default="author", description="whom to name")
    source: str | list[str] | None = Field(default=["package", "source"], description="where it comes from; list joined by /")
    group: str | list[str] | None = Field(default=["package", "source"], description="rows that share it are never split")


class ImageConfig(StageConfig):
    """Limits and normal form of pictures."""

    side: int = Field(default=256, ge=16, le=4096, description="px, longer side of the stored copy; never enlarged")
    min_side: int = Field(default=16, ge=1, le=4096, description="px, shorter side of the original")
    max_aspect: float = Field(default=10.0, ge=1, le=1000, description="longer over shorter side")
    max_megapixels: float = Field(default=50.0, gt=0, le=1000, description="10^6 px, judged from the header before decoding")
    max_file_mb: float = Field(default=100.0, gt=0, le=4096, description="10^6 bytes")
    animated: Literal["first", "refuse"] = Field(default="first", description="several frames: take the first, or quarantine")
    near_duplicate_bits: int = Field(default=4, ge=-1, le=8, description="of 64 perceptual-hash bits; -1: none")


class AudioConfig(StageConfig):
    """Limits of sounds. The normal form is fixed: mono, 48 kHz, 16-bit FLAC."""

    min_seconds: float = Field(default=0.1, ge=0.01, le=60)
    max_seconds: float = Field(default=60.0, gt=0, le=3600)
    silence_lufs: float = Field(default=-70.0, ge=-70, le=-20, description="at or below it a sound abstains")

    @model_validator(mode="after")
    def _order(self) -> AudioConfig:
        if self.min_seconds >= self.max_seconds:
            raise ValueError("min_seconds must be below max_seconds")
        return self


class DecoderLimitsConfig(StageConfig):
    """Of one decoding process. They bound what a hostile file can do and do not shape results."""

    workers: int = Field(default=0, ge=0, le=256, description="processes; 0 is one per core")
    timeout_seconds: float = Field(default=30.0, gt=0, le=3600, description="per file")
    memory_mb: int = Field(default=2048, ge=512, le=65536, description="address space of one process")


class IngestConfig(StageConfig):
    """What to read, how to judge it, and when to give up."""

    root: str = Field(default="data/demo", min_length=1, description="folder of pictures and sounds")
    layout: Literal["auto", "table", "files", "webdataset", "datasets", "parquet", "fsd50k", "audioset", "esc50", "coco"] = (
        Field(default="auto", description="auto: `metadata` if set, else a layout known by its files, else every file below")
    )
    metadata: str | None = Field(default="manifest.csv", description="CSV or Parquet inside `root`; null walks the whole tree")
    columns: MetadataColumnsConfig = MetadataColumnsConfig()
    pool: Filter | None = Field(default=POOL, description="rows to pair and train on; null: all that are not held out")
    holdout: Filter | None = Field(default=HOLDOUT, description="rows for evaluation alone")
    picture: ImageConfig = ImageConfig()
    sound: AudioConfig = AudioConfig()
    limits: DecoderLimitsConfig = DecoderLimitsConfig()
    max_failed_fraction: float = Field(default=0.05, ge=0, le=1, description="quarantined share above which the stage fails")
    shard_prefix: int = Field(default=1, ge=1, le=4, description="hex digits per shard name: 16^n shards a kind")
