"""Parameters of the `assets` stage."""

from __future__ import annotations

from pydantic import Field, field_validator

from pipeline_steps.core.config import StageConfig


class AssetsConfig(StageConfig):
    """Assets to fetch. Their packages, versions and hashes are in `assets.toml`."""

    names: list[str] = Field(default_factory=list, max_length=100, description="assets to fetch; empty: all in assets.toml")
    timeout_seconds: float = Field(900.0, gt=0, le=86_400, description="time limit of one download, in seconds")

    @field_validator("names")
    @classmethod
    def _unique(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise ValueError("names must not repeat")
        return names
