"""Cards of the abilities: a sentence, curves with intervals, image strips and audio players for each. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.evaluate.abilities.base import SWEEP
from pipeline_steps.evaluate.abilities.definitions import ABILITIES
from pipeline_steps.evaluate.abilities.run_abilities import ShownSweep, control_text
from pipeline_steps.evaluate.evaluation_plan import evenly_spaced_indices
from pipeline_steps.evaluate.report.charts import curves_with_intervals, number_text
from pipeline_steps.evaluate.report.media import ReportMedia

Row = Mapping[str, Any]

STRIP_SIDE = 96
"""Largest side in px of an image of a strip."""
NUM_PLAYERS = 5
"""Players of a sweep; a control has one, of its last clip."""


def ability_cards(block: Row, shown: Sequence[ShownSweep], media: ReportMedia) -> list[dict[str, Any]]:
    """Card of each ability of the block `abilities`, in the order of `ABILITIES`."""
    cards = []
    for name in (name for name in ABILITIES if name in block):
        found = block[name]
        card = {"title": found["title"], "text": found.get("sentence") or f"Not measured: {found['reason']}."}
        card |= {
            "verdict": found.get("verdict", "not measured").replace("_", " "),
            "chart": None,
            "score": "",
            "range": "",
            "items": [],
        }
        if found["applicable"]:
            curves = {condition: metrics["curve"] for condition, metrics in conditions(found)}
            ends = [number_text(ABILITIES[name].points[place]) for place in (0, -1)]
            card["range"] = f"{found['axis']}: {ends[0]} to {ends[1]}"
            card |= {"chart": curves_with_intervals(curves, found["axis"]), "score": found["score"]}
            card["items"] = _items([sweep for sweep in shown if sweep.ability == name], media)
        cards.append(card)
    return cards


def conditions(found: Row) -> Iterator[tuple[str, Row]]:
    """Sweep and controls of an ability by their names in the report."""
    yield SWEEP, found["sweep"]
    for name, metrics in found["controls"].items():
        yield f"control {control_text(name)}", metrics


def curve_rows(block: Row) -> list[dict[str, Any]]:
    """Rows of `plots/abilities.csv`: one per ability, condition and point."""
    return [
        {"ability": name, "condition": condition, **{key: point.get(key) for key in ("at", "value", "low", "high", "n")}}
        for name, found in block.items()
        if found["applicable"]
        for condition, metrics in conditions(found)
        for point in metrics["curve"]
    ]


def _items(shown: Sequence[ShownSweep], media: ReportMedia) -> list[dict[str, Any]]:
    """Strips of each item; the sweeps of an item follow each other."""
    items: list[dict[str, Any]] = []
    for sweep in shown:
        if sweep.condition == SWEEP:
            items.append({"caption": sweep.caption, "sweeps": []})
        key = f"{sweep.ability}-{len(items)}-{sweep.condition}".replace("_", "-")
        images = small_images(sweep.images)
        played = (
            evenly_spaced_indices(len(sweep.audio), NUM_PLAYERS, include_last=True)
            if sweep.condition == SWEEP
            else [len(sweep.audio) - 1]
        )
        items[-1]["sweeps"].append(
            {
                "name": control_text(sweep.condition),
                "control": sweep.condition != SWEEP,
                "strip": media.strip(key, images),
                "width": len(images) * (images.shape[2] + 2) - 2,
                "height": images.shape[1],
                "audio": [media.clip(f"{key}-{place}", sweep.audio[place]) for place in played],
            }
        )
    return items


def small_images(images: ByteArray) -> ByteArray:
    """Images uint8 [P, H, W, 3] reduced to `STRIP_SIDE`, never enlarged."""
    height, width = images.shape[1:3]
    scale = min(1.0, STRIP_SIDE / max(height, width))
    if scale == 1.0:
        return images
    size = (round(width * scale), round(height * scale))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in images])
