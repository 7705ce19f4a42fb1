"""Seeing Sound: image-audio pairs from unrelated collections, and an audio-to-image diffusion model trained on them."""

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = ("Audio2ImagePipeline", "embed_sounds", "find_sounds", "load_pairs")


def __getattr__(name: str) -> Any:
    """Member of `pipeline_steps.api`, which is imported at the first use."""
    if name in _PUBLIC:
        return getattr(importlib.import_module("pipeline_steps.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
