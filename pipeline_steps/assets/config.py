"""Parameters of the `assets` stage."""

from __future__ import annotations

from pydantic import Field, field_validator

from pipeline_steps.core.config import StageConfig


class AssetsConfig(StageConfig):
    """What to fetch. The list itself (packages, versions, hashes) is `assets.toml`, not a parameter."""

    names: list[str] = Field(default_factory=list, max_length=100, description="assets to fetch; empty: all in assets.toml")
    timeout_seconds: float = Field(900.0, gt=0, le=86_400, description="longest time one download may take")

    @field_validator("names")
    @classmethod
    def _unique(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise ValueError("names must not repeat")
        return names
