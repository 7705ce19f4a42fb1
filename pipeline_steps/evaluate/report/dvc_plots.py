"""Files that `dvc plots` shows: curves, win rates, ability sweeps and sample grids. No I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline_steps.core.array_types import ByteArray
from pipeline_steps.evaluate.evaluation_plan import EvaluationPlan, evenly_spaced_indices
from pipeline_steps.evaluate.metrics.set_metrics import LOOKUP_ROWS
from pipeline_steps.evaluate.report.ability_cards import conditions
from pipeline_steps.evaluate.report.media import strip

Row = Mapping[str, Any]
Curves = Mapping[str, Sequence[tuple[float, float]]]

MAX_POINTS = 400
"""Points of a training curve; each is the mean of an equal number of steps."""
GRID_ROWS, GRID_COLUMNS = 8, 2
"""Pairs of a sample grid from top to bottom and from left to right."""
GRID_GAP = 6
"""px of white around the columns of a grid."""
GRID_SETS = ("test", "gold")


def training_rows(curves: Curves) -> list[dict[str, float]]:
    """Rows of `plots/training_loss.csv`: the training loss by step, averaged over equal intervals."""
    points = curves.get("loss", ())
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [{"step": part[-1][0], "training_loss": round(sum(value for _, value in part) / len(part), 6)} for part in parts]


def win_rate_rows(evaluation: Row, judge: str) -> list[dict[str, Any]]:
    """Rows of `plots/win_rates.csv`: win rate of the model and of its controls on every set, by the judge of the headline."""
    rows = []
    for name, block in evaluation.items():
        if isinstance(block, Mapping) and "rows" in block:
            for row, metrics in block["rows"].items():
                found = metrics.get(f"win_rate_{judge}", {}) if row != LOOKUP_ROWS[1] else {}
                if found.get("value") is not None:
                    numbers = {key: found.get(key) for key in ("low", "high", "n")}
                    rows.append({"row": f"{name}: {row}", "win_rate": found["value"], **numbers})
    return rows


def ability_tables(block: Row) -> dict[str, list[dict[str, Any]]]:
    """Rows of `plots/abilities/NAME.csv` by name: the score at each point of the sweep, for the model and its first control.

    An ability that was not measured has no rows. All tables have the same columns, so that one entry of `dvc.yaml` plots them;
    `plots/abilities.csv` has every control.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for name, found in block.items():
        points: dict[float, dict[str, Any]] = {}
        if found["applicable"]:
            for column, (_, metrics) in zip(("model", "control"), conditions(found), strict=False):
                for point in metrics["curve"]:
                    points.setdefault(point["at"], {"at": point["at"]})[column] = point["value"]
        tables[name] = [points[at] for at in sorted(points)]
    return tables


def sample_grids(plan: EvaluationPlan, generated: ByteArray, load_image: Callable[[str], ByteArray]) -> dict[str, ByteArray]:
    """Grid of a set by its name, uint8 [H, W, 3]: each row is the real image of a pair and the images made from its sound.

    Args:
        plan: pairs and clips. The pairs shown are evenly spaced, the same for every model.
        generated: images by clip, uint8 [M, S, H, W, 3].
        load_image: reads an image by id.
    """
    grids = {}
    for name in GRID_SETS:
        pairs = plan.sets[name]
        shown = [pairs[index] for index in evenly_spaced_indices(len(pairs), GRID_ROWS * GRID_COLUMNS)]
        cells = [_row(load_image(pair.image_id), generated[pair.clip]) for pair in shown]
        if cells:
            columns = math.ceil(len(cells) / GRID_ROWS)
            grids[name] = _sheet([cells[start : start + GRID_ROWS] for start in range(0, columns * GRID_ROWS, GRID_ROWS)])
    return grids


def _row(image: ByteArray, samples: ByteArray) -> ByteArray:
    side = samples.shape[1:3]
    real = np.asarray(Image.fromarray(image).resize((side[1], side[0]), Image.Resampling.LANCZOS))
    return strip(np.concatenate([real[None], samples]))


def _sheet(columns: Sequence[Sequence[ByteArray]]) -> ByteArray:
    height, width, _ = columns[0][0].shape
    step_y, step_x = height + GRID_GAP, width + 2 * GRID_GAP
    sheet = np.full((len(columns[0]) * step_y, len(columns) * step_x, 3), 255, np.uint8)
    for x, cells in enumerate(columns):
        for y, cell in enumerate(cells):
            sheet[y * step_y : y * step_y + height, x * step_x : x * step_x + width] = cell
    return sheet
