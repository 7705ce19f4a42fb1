"""What an evaluation run says about a model, and how two of them compare on the same test items."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.tracking.errors import EntryRejectedError
from pipeline_steps.tracking.registry.model_registry import ModelRegistry, ModelVersionInfo, run_datasets
from pipeline_steps.tracking.registry.paired_bootstrap import PairedDifference, from_draws, paired_difference

if TYPE_CHECKING:
    from mlflow.entities import Run


HIGHER = ("win_rate", "ais_winrate", "density", "coverage")
"""Metrics (the beginning of their name) that are better when they are higher; all others are distances."""

OF_THE_MODEL = ("guidance_scale", "steps", "side_px")
"""Lines of the protocol that describe the model, not how it was judged."""


@dataclass(frozen=True, slots=True)
class EvaluationRun:
    """One evaluation of one model.

    Attributes:
        run_id: MLflow run of the evaluation.
        data: data set -> DVC md5, of everything it read but the model.
        protocol: how it was judged: judges, seed, samples a sound.
        values: "set/metric" -> {value, low, high, n, clusters} of the model's own row.
        items: rows of the item table: set, pair, sound, cluster, and a number a metric.
        draws: "set/metric" -> bootstrap draws [repeats], made with the same resampling for every model on the same data.
        notes: warnings of the evaluation.
    """

    run_id: str
    data: Mapping[str, str]
    protocol: Mapping[str, Any]
    values: Mapping[str, Mapping[str, Any]]
    items: Sequence[Mapping[str, str]]
    draws: Mapping[str, DoubleArray]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """One metric of two models on the same items.

    Attributes:
        metric: "set/metric".
        higher_is_better: direction.
        a, b: the two values.
        difference: B minus A with interval; without one (low, high, p None) where the metric allows no resampling.
        wins, losses: items on which B is better, and worse; None where the metric has no value per item.
        note: why there is no interval; else empty.
    """

    metric: str
    higher_is_better: bool
    a: float
    b: float
    difference: PairedDifference
    wins: int | None = None
    losses: int | None = None
    note: str = ""

    @property
    def gain(self) -> float:
        """How much better B is, in the metric's own unit; below zero: worse."""
        return self.difference.value if self.higher_is_better else -self.difference.value

    @property
    def gain_interval(self) -> tuple[float, float] | None:
        """95 % interval of `gain`."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return None
        return (low, high) if self.higher_is_better else (-high, -low)

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `no difference shown` (the interval holds zero) or `not tested`."""
        interval = self.gain_interval
        if interval is None:
            return "not tested"
        return "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "no difference shown"

    def as_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "a": self.a,
            "b": self.b,
            "difference": self.difference.value,
            "low": self.difference.low,
            "high": self.difference.high,
            "p": self.difference.p,
            "n": self.difference.n,
            "clusters": self.difference.clusters,
            "items_better": self.wins,
            "items_worse": self.losses,
            "verdict": self.verdict,
            "note": self.note,
        }


def load_evaluation_run(registry: ModelRegistry, run: Run) -> EvaluationRun:
    """Numbers, items and draws of an evaluation run, from its artifacts.

    Raises:
        DataError: the run has no report.
    """
    model = registry.layout.model.relative_to(registry.layout.root).as_posix()
    data = {name: digest for name, digest in run_datasets(run).items() if name != model}
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = json.loads(_fetch(registry, run.info.run_id, "report/evaluation.json", Path(scratch)) or "{}")
        items = _fetch(registry, run.info.run_id, "report/plots/items.csv", Path(scratch))
        draws = _fetch(registry, run.info.run_id, "report/plots/draws.csv", Path(scratch))
    if not evaluation:
        raise DataError(f"evaluation run {run.info.run_id} holds no report", "run: dvc repro --force evaluate")
    values = {}
    for key, block in evaluation.items():
        if isinstance(block, Mapping) and "rows" in block:
            for metric, found in block["rows"].get("model", {}).items():
                if isinstance(found, Mapping) and found.get("value") is not None:
                    values[f"{key}/{metric}"] = found
    return EvaluationRun(
        run.info.run_id,
        data,
        {key: value for key, value in evaluation.get("protocol", {}).items() if key not in OF_THE_MODEL},
        values,
        list(csv.DictReader(io.StringIO(items))) if items else [],
        _draws(draws) if draws else {},
        tuple(evaluation.get("warnings", ())),
    )


def data_mismatches(a: EvaluationRun, b: EvaluationRun) -> list[str]:
    """Why the two were not judged on the same data in the same way; empty when they were."""
    problems = []
    for name in sorted({*a.data, *b.data}):
        first, second = a.data.get(name, "not read"), b.data.get(name, "not read")
        if first != second:
            problems.append(f"{name} differs: {first} and {second}")
    for name in sorted({*a.protocol, *b.protocol}):
        if a.protocol.get(name) != b.protocol.get(name):
            problems.append(f"judged differently: {name} is {a.protocol.get(name)!r} and {b.protocol.get(name)!r}")
    if not problems and [_who(row) for row in a.items] != [_who(row) for row in b.items]:
        problems.append("the tables of test items are not the same")
    return problems


def compare(a: EvaluationRun, b: EvaluationRun) -> list[MetricComparison]:
    """Every metric that both have, by name.

    Raises:
        IntegrityError: they were not judged on the same data.
    """
    if problems := data_mismatches(a, b):
        raise IntegrityError(f"the two evaluations cannot be paired: {'; '.join(problems)}", "evaluate both on one set")
    return [_compare_metric(metric, a, b) for metric in sorted({*a.values} & {*b.values})]


def _compare_metric(metric: str, a: EvaluationRun, b: EvaluationRun) -> MetricComparison:
    group, _, name = metric.partition("/")
    higher = name.startswith(HIGHER)
    first, second = a.values[metric], b.values[metric]
    value = float(second["value"]) - float(first["value"])
    repeats, seed = int(a.protocol.get("bootstrap_repeats", 2000)), int(a.protocol.get("seed", 0))
    column = f"{name}.model"
    rows = [pair for pair in zip(a.items, b.items, strict=True) if pair[0].get("set") == group]
    ours, theirs = ([_number(row.get(column)) for row in side] for side in (zip(*rows, strict=True) if rows else ((), ())))
    wins = losses = None
    note = ""
    if any(math.isfinite(x) and math.isfinite(y) for x, y in zip(ours, theirs, strict=True)):
        clusters = [row.get("cluster") or row["sound"] for row, _ in rows]
        difference = paired_difference(ours, theirs, clusters, repeats, seed)
        gains = [(y - x) if higher else (x - y) for x, y in zip(ours, theirs, strict=True)]
        wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    elif metric in a.draws and metric in b.draws and len(a.draws[metric]) == len(b.draws[metric]):
        draws = b.draws[metric] - a.draws[metric]
        difference = from_draws(value, draws, int(second["n"]), int(second["clusters"]))
    else:
        difference = PairedDifference(value, None, None, None, int(second["n"]), int(second["clusters"]))
        note = (
            "biased at this number of pictures, so it is not resampled"
            if name.startswith("frechet")
            else "this evaluation kept no bootstrap draws"
        )
    return MetricComparison(metric, higher, float(first["value"]), float(second["value"]), difference, wins, losses, note)


def latest_comparable_evaluations(
    registry: ModelRegistry, a: ModelVersionInfo, b: ModelVersionInfo
) -> tuple[EvaluationRun, EvaluationRun]:
    """The newest evaluations of two versions that were made on the same data; else the newest of each, which do not fit.

    Raises:
        DataError: one of them was never evaluated.
    """
    found = []
    for info in (a, b):
        runs = registry.evaluations(info)
        if not runs:
            raise DataError(f"version {info.version} has no evaluation in MLflow", "run: dvc repro --force evaluate")
        found.append([_LazyEvaluation(registry, run) for run in runs])
    for second in found[1]:
        for first in found[0]:
            if not data_mismatches(first.get(), second.get()):
                return first.get(), second.get()
    return found[0][0].get(), found[1][0].get()


@dataclass
class _LazyEvaluation:
    """A judgement that is read when it is first looked at."""

    registry: ModelRegistry
    run: Run
    found: list[EvaluationRun] = field(default_factory=list)

    def get(self) -> EvaluationRun:
        if not self.found:
            self.found.append(load_evaluation_run(self.registry, self.run))
        return self.found[0]


def _fetch(registry: ModelRegistry, run_id: str, path: str, scratch: Path) -> str:
    """Text of an artifact; empty when the run has none of this name."""
    folder, _, leaf = path.rpartition("/")
    listed = registry.call(lambda: registry.client.list_artifacts(run_id, folder))
    if not any(item.path.rsplit("/", 1)[-1] == leaf for item in listed):
        return ""
    try:
        local = registry.call(lambda: registry.client.download_artifacts(run_id, path, str(scratch)))
    except EntryRejectedError as error:
        raise DataError(f"artifact {path} of run {run_id} cannot be read: {error}") from error
    return Path(local).read_text(encoding="utf-8")


def _draws(text: str) -> dict[str, DoubleArray]:
    rows = list(csv.reader(io.StringIO(text)))
    table = np.array([[_number(cell) for cell in row] for row in rows[1:]], np.float64)
    return {name: table[:, column] for column, name in enumerate(rows[0]) if len(table)}


def _who(row: Mapping[str, str]) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in ("set", "pair", "image_id", "sound"))


def _number(text: str | None) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan
