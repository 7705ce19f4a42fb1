"""Events table with one event per image, and names of demo clips."""

from __future__ import annotations

from pipeline_steps.core.hashing import text_id
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import EVENTS
from pipeline_steps.core.tables import write_table

CLIPS = ["dog-003", "sheep-000", "train-000", "trumpet-000"]


def write_events(layout: ProjectPaths, phrases: dict[str, str]) -> None:
    """Write one event per image: {image id: phrase}."""
    rows = [
        {
            "image_id": image_id,
            "rank": 0,
            "text_id": text_id(phrase),
            "phrase": phrase,
            "sound_source": "it",
            "visible": True,
            "salience": 1.0,
            "confidence": 0.8,
        }
        for image_id, phrase in phrases.items()
    ]
    write_table(layout.captions / "events.parquet", EVENTS, rows)
