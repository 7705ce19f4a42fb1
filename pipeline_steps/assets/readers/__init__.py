"""Readers of TensorFlow's file formats, and their error."""

from __future__ import annotations

from pipeline_steps.core.errors import IntegrityError


class AssetFormatError(IntegrityError):
    """The bytes of an asset do not have the expected format."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "correct the asset's entry in assets.toml, or fetch the asset again: dvc repro assets")
