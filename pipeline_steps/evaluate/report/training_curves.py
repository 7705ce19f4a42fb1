"""What training left beside the weights, read for the report. Pure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping

STEP_COLUMNS = ("step", "steps", "samples", "epoch")


def training_curves(tables: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Curves by column name from CSV texts by file name: (step, value) of every finite number beside a step column.

    Empty cells are skipped, so that tables which log different columns at different steps work.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for _, text in sorted(tables.items()):
        reader = csv.DictReader(io.StringIO(text))
        axis = next((name for name in STEP_COLUMNS if name in (reader.fieldnames or [])), None)
        if axis is None:
            continue
        for row in reader:
            step = _number(row[axis])
            for name, cell in row.items():
                value = _number(cell)
                if step is not None and value is not None and name not in STEP_COLUMNS:
                    curves.setdefault(str(name), []).append((step, value))
    return curves


def _number(cell: str | None) -> float | None:
    try:
        value = float(cell or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
