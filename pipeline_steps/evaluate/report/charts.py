"""Charts of the page as SVG coordinates in px; the template only places the shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH = 400.0
"""px; a telephone shows this width without scrolling."""
MARGIN = 14.0
ROW = 36.0
"""px of a row: its label, and below it the interval."""
TOP = 14.0
AXIS = 30.0


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis: position in px and its text."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class IntervalRow:
    """One line of an interval chart; `low` and `high` are equal to `at` when there is no interval."""

    label: str
    y: float
    at: float
    low: float
    high: float
    text: str
    kind: str


@dataclass(frozen=True, slots=True)
class IntervalChart:
    """Values with intervals, one per row, and an optional reference line (chance)."""

    height: float
    rows: tuple[IntervalRow, ...]
    ticks: tuple[Tick, ...]
    reference: float | None


@dataclass(frozen=True, slots=True)
class Polyline:
    """A polyline: name, class number for its color, SVG points."""

    name: str
    number: int
    points: str


@dataclass(frozen=True, slots=True)
class LineChart:
    """Curves over steps."""

    height: float
    lines: tuple[Polyline, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    bands: tuple[Polyline, ...] = ()


def interval_chart(
    rows: Sequence[tuple[str, Mapping[str, Any], str]],
    reference: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> IntervalChart | None:
    """Rows (label, entry of evaluation.json, kind) as a chart; rows without a value are left out; None if none is left.

    `kind` names the color: model, control or truth. The axis covers `bounds` and every value.
    """
    known = [(label, found, kind) for label, found, kind in rows if found.get("value") is not None]
    if not known:
        return None
    values = [float(found[key]) for _, found, _ in known for key in ("value", "low", "high") if found.get(key) is not None]
    values += [*(bounds or ()), *([] if reference is None else [reference])]
    low, high = min(values), max(values)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def place(value: float) -> float:
        return round(MARGIN + (WIDTH - 2 * MARGIN) * (value - low) / (high - low or 1.0), 2)

    placed = []
    for number, (label, found, kind) in enumerate(known):
        value = float(found["value"])
        ends = [float(found[key]) if found.get(key) is not None else value for key in ("low", "high")]
        placed.append(
            IntervalRow(
                label,
                round(TOP + ROW * (number + 0.7), 2),
                place(value),
                place(ends[0]),
                place(ends[1]),
                number_text(value),
                kind,
            )
        )
    marks = tuple(Tick(place(value), number_text(value)) for value in ticks)
    return IntervalChart(TOP + ROW * len(known) + AXIS, tuple(placed), marks, None if reference is None else place(reference))


def line_chart(curves: Mapping[str, Sequence[tuple[float, float]]], x_label: str, smooth: int = 1) -> LineChart | None:
    """Curves name -> [(x, y)], the y axis covers the central 99 % of the values, so that outliers do not flatten the curves.

    `smooth` replaces each y by the mean of up to that many points before it (itself included). None if no curve has two points.
    """
    kept = {name: _smoothed(points, smooth) for name, points in sorted(curves.items()) if len(points) > 1}
    if not kept:
        return None
    xs = [x for points in kept.values() for x, _ in points]
    ys = sorted(y for points in kept.values() for _, y in points)
    bottom, top = ys[int(0.005 * (len(ys) - 1))], ys[math.ceil(0.995 * (len(ys) - 1))]
    x_ticks, y_ticks = [x for x in nice_ticks(0.0, max(xs)) if x <= max(xs)], nice_ticks(bottom, top)
    lines = {name: _subsampled(points) for name, points in kept.items()}
    return _line_chart(lines, {}, (0.0, max(xs)), (bottom, top), x_ticks, y_ticks, x_label)


def curves_with_intervals(curves: Mapping[str, Sequence[Mapping[str, Any]]], x_label: str) -> LineChart | None:
    """Curves name -> entries of evaluation.json with a position `at`, each with the band of its intervals.

    Returns:
        None without a value.
    """
    points = {name: [point for point in curve if point["value"] is not None] for name, curve in curves.items()}
    ends = {name: [[float(p["value"] if p[key] is None else p[key]) for p in found] for key in ("low", "high")]
            for name, found in points.items()}  # fmt: skip
    xs = [float(point["at"]) for found in points.values() for point in found]
    ys = [y for pair in ends.values() for side in pair for y in side]
    if not xs:
        return None
    x_ticks, y_ticks = [x for x in nice_ticks(min(xs), max(xs), 8) if min(xs) <= x <= max(xs)], nice_ticks(min(ys), max(ys))
    lines, bands = {}, {}
    for name, found in points.items():
        at = [float(point["at"]) for point in found]
        low, high = ends[name]
        lines[name] = [(x, float(point["value"])) for x, point in zip(at, found, strict=True)]
        bands[name] = [*zip(at, high, strict=True), *zip(at[::-1], low[::-1], strict=True)]
    return _line_chart(lines, bands, (min(xs), max(xs)), (min(ys), max(ys)), x_ticks, y_ticks, x_label)


def _line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    bands: Mapping[str, Sequence[tuple[float, float]]],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
) -> LineChart:
    """Place lines and bands; the y axis covers `y_range` and the ticks, and values outside are clipped."""
    (left, right), height = x_range, 260.0
    bottom, top = min(y_range[0], y_ticks[0]), max(y_range[1], y_ticks[-1])

    def across(x: float) -> float:
        return round(56.0 + (WIDTH - 72.0) * (x - left) / (right - left or 1.0), 2)

    def up(y: float) -> float:
        inside = min(max(y, bottom), top)
        return round(TOP + (height - TOP - 40) * (1 - (inside - bottom) / (top - bottom or 1.0)), 2)

    def polylines(curves: Mapping[str, Sequence[tuple[float, float]]]) -> tuple[Polyline, ...]:
        return tuple(
            Polyline(name, number % 4, " ".join(f"{across(x)},{up(y)}" for x, y in points))
            for number, (name, points) in enumerate(curves.items())
        )

    marks = tuple(Tick(across(x), number_text(x)) for x in x_ticks), tuple(Tick(up(y), number_text(y)) for y in y_ticks)
    return LineChart(height, polylines(lines), *marks, x_label, polylines(bands))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that span [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, last + 1)]


def number_text(value: float) -> str:
    """Text of a number, rounded by its size, with a minus sign (U+2212) and commas between thousands."""
    if value == 0:
        return "0"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}".replace("-", "\u2212")
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.0f}"
    elif size >= 10:
        text = f"{value:.1f}"
    elif size >= 0.01:
        text = f"{value:.3f}".rstrip("0").rstrip(".")
    else:
        text = f"{value:.2g}"
    return text.replace("-", "\u2212")


def _smoothed(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    ordered = sorted(points)
    found = []
    for place, (x, _) in enumerate(ordered):
        window = [y for _, y in ordered[max(0, place - width + 1) : place + 1]]
        found.append((x, sum(window) / len(window)))
    return found


def _subsampled(points: Sequence[tuple[float, float]], at_most: int = 400) -> list[tuple[float, float]]:
    if len(points) <= at_most:
        return list(points)
    return [points[int(place * (len(points) - 1) / (at_most - 1))] for place in range(at_most)]
