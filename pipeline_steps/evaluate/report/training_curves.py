"""Training history of an exported model, for the report. No I/O."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STEP_COLUMNS = ("step", "steps", "samples", "epoch")


@dataclass(frozen=True, slots=True)
class TrainingHistory:
    """Curves by name as [(step, value)], and sample grids by step as PNG bytes."""

    curves: Mapping[str, Sequence[tuple[float, float]]]
    grids: Mapping[int, bytes]


def training_curves(tables: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Curves [(step, value)] by column name, from the texts of CSV files by file name.

    Every column beside a step column is a curve. Cells without a finite number are skipped, because a table may log different
    columns at different steps.
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
