"""Hand-written phrases for tags of AudioSet whose name does not say what makes the sound: "Moo" -> "a cow mooing"."""

from __future__ import annotations

import csv
import io
from functools import lru_cache
from importlib import resources

PHRASES_FILE = "audioset_phrases.csv"


@lru_cache(maxsize=1)
def hand_written_phrases() -> dict[str, list[str]]:
    """Tag name -> phrases of the packaged table."""
    text = resources.files("pipeline_steps.models.text_audio").joinpath(PHRASES_FILE).read_text(encoding="utf-8")
    return {row["name"]: row["phrases"].split("|") for row in csv.DictReader(io.StringIO(text))}
