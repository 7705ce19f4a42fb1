"""Evaluation runs read from MLflow, and paired comparison of two of them on the same test items."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline_steps.core.array_types import DoubleArray
from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.tracking.client.mlflow_client import run_datasets
from pipeline_steps.tracking.errors import EntryRejectedError
from pipeline_steps.tracking.lineage.dvc_digests import relative
from pipeline_steps.tracking.registry.model_registry import ModelRegistry, ModelVersionInfo
from pipeline_steps.tracking.registry.paired_bootstrap import PairedDifference, difference_from_bootstrap, paired_difference

if TYPE_CHECKING:
    from mlflow.entities import Run


HIGHER_IS_BETTER = ("win_rate", "ais_win_rate", "density", "coverage")
"""Prefixes of metrics for which higher is better; all other metrics are distances."""

MODEL_PROTOCOL_KEYS = ("guidance_scale", "num_inference_steps", "side_px")
"""Keys of the evaluation protocol that describe the model; they may differ between two models."""


@dataclass(frozen=True, slots=True)
class EvaluationRun:
    """One evaluation of one model.

    Attributes:
        run_id: MLflow run of the evaluation.
        data: data set -> DVC md5 of everything that the evaluation read except the model.
        protocol: settings of the evaluation: judges, seed, samples per clip.
        values: "set/metric" -> {value, low, high, n, clusters} of the row `model`.
        items: rows of the item table: set, pair, sound (clip id), cluster, and one number per metric.
        replicates: "set/metric" -> bootstrap replicates [repeats]; the resampling is the same for all models on the same data.
        notes: warnings of the evaluation.
    """

    run_id: str
    data: Mapping[str, str]
    protocol: Mapping[str, Any]
    values: Mapping[str, Mapping[str, Any]]
    items: Sequence[Mapping[str, str]]
    replicates: Mapping[str, DoubleArray]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """One metric of two models on the same items.

    Attributes:
        metric: "set/metric".
        higher_is_better: direction of the metric.
        a, b: the two values.
        difference: B minus A; low, high and p are None if the metric cannot be resampled.
        wins, losses: number of items on which B is better or worse; None if the metric has no value per item.
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
        """Improvement of B over A in the metric's unit; negative if B is worse."""
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
        """`better`, `worse`, `no difference shown` (the interval contains zero) or `not tested`."""
        interval = self.gain_interval
        if interval is None:
            return "not tested"
        return "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "no difference shown"

    def as_dict(self) -> dict[str, Any]:
        """Fields for JSON."""
        difference = asdict(self.difference)
        return {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "a": self.a,
            "b": self.b,
            "difference": difference.pop("value"),
            **difference,
            "items_better": self.wins,
            "items_worse": self.losses,
            "verdict": self.verdict,
            "note": self.note,
        }


def load_evaluation_run(registry: ModelRegistry, run: Run) -> EvaluationRun:
    """Read the values, items and bootstrap replicates of an evaluation run from its artifacts.

    Raises:
        DataError: the run has no report.
    """
    model = relative(registry.layout, registry.layout.model)
    data = {name: digest for name, digest in run_datasets(run).items() if name != model}
    with tempfile.TemporaryDirectory() as scratch:
        evaluation = json.loads(_fetch(registry, run.info.run_id, "report/evaluation.json", Path(scratch)) or "{}")
        items = _fetch(registry, run.info.run_id, "report/plots/per_pair.csv", Path(scratch))
        replicates = _fetch(registry, run.info.run_id, "report/plots/bootstrap.csv", Path(scratch))
    if not evaluation:
        raise DataError(f"evaluation run {run.info.run_id} has no report", "run: dvc repro --force evaluate")
    values = {}
    for key, block in evaluation.items():
        if isinstance(block, Mapping) and "rows" in block:
            for metric, found in block["rows"].get("model", {}).items():
                if isinstance(found, Mapping) and found.get("value") is not None:
                    values[f"{key}/{metric}"] = found
    return EvaluationRun(
        run.info.run_id,
        data,
        {key: value for key, value in evaluation.get("protocol", {}).items() if key not in MODEL_PROTOCOL_KEYS},
        values,
        list(csv.DictReader(io.StringIO(items))) if items else [],
        _parse_replicates(replicates) if replicates else {},
        tuple(evaluation.get("warnings", ())),
    )


def data_mismatches(a: EvaluationRun, b: EvaluationRun) -> list[str]:
    """Differences in data or protocol that make two evaluations incomparable; empty if there are none."""
    problems = []
    for name in sorted({*a.data, *b.data}):
        first, second = a.data.get(name, "not read"), b.data.get(name, "not read")
        if first != second:
            problems.append(f"{name} differs: {first} and {second}")
    for name in sorted({*a.protocol, *b.protocol}):
        if a.protocol.get(name) != b.protocol.get(name):
            problems.append(f"protocol differs: {name} is {a.protocol.get(name)!r} and {b.protocol.get(name)!r}")
    if not problems and [_item_key(row) for row in a.items] != [_item_key(row) for row in b.items]:
        problems.append("the tables of test items differ")
    return problems


def compare(a: EvaluationRun, b: EvaluationRun) -> list[MetricComparison]:
    """Compare every metric that both evaluations have, in the order of names.

    Raises:
        IntegrityError: the evaluations are not comparable.
    """
    if problems := data_mismatches(a, b):
        raise IntegrityError(f"the evaluations are not comparable: {'; '.join(problems)}", "evaluate both on the same data")
    return [_compare_metric(metric, a, b) for metric in sorted({*a.values} & {*b.values})]


def _compare_metric(metric: str, a: EvaluationRun, b: EvaluationRun) -> MetricComparison:
    group, _, name = metric.partition("/")
    higher = name.startswith(HIGHER_IS_BETTER)
    first, second = a.values[metric], b.values[metric]
    value, n, num_clusters = float(second["value"]) - float(first["value"]), int(second["n"]), int(second["clusters"])
    repeats, seed = int(a.protocol.get("num_bootstrap", 2000)), int(a.protocol.get("seed", 0))
    rows = [pair for pair in zip(a.items, b.items, strict=True) if pair[0].get("set") == group]
    pairs = [(_number(row.get(f"{name}.model")), _number(other.get(f"{name}.model"))) for row, other in rows]
    wins = losses = None
    note = ""
    if any(math.isfinite(x) and math.isfinite(y) for x, y in pairs):
        clusters = [row.get("cluster") or row["sound"] for row, _ in rows]
        difference = paired_difference([x for x, _ in pairs], [y for _, y in pairs], clusters, repeats, seed)
        gains = [(y - x) if higher else (x - y) for x, y in pairs]
        wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    elif metric in a.replicates and metric in b.replicates and len(a.replicates[metric]) == len(b.replicates[metric]):
        difference = difference_from_bootstrap(value, b.replicates[metric] - a.replicates[metric], n, num_clusters)
    else:
        difference = PairedDifference(value, None, None, None, n, num_clusters)
        note = (
            "not resampled: the metric is biased at this number of images"
            if name.startswith("fd_")
            else "the evaluation has no bootstrap replicates"
        )
    return MetricComparison(metric, higher, float(first["value"]), float(second["value"]), difference, wins, losses, note)


def latest_comparable_evaluations(
    registry: ModelRegistry, a: ModelVersionInfo, b: ModelVersionInfo
) -> tuple[EvaluationRun, EvaluationRun]:
    """Return the newest comparable evaluations of two versions; if none are comparable, the newest of each.

    Raises:
        DataError: a version was never evaluated.
    """
    runs_of_a, runs_of_b = (registry.evaluations(info) for info in (a, b))
    for info, runs in ((a, runs_of_a), (b, runs_of_b)):
        if not runs:
            raise DataError(f"version {info.version} has no evaluation in MLflow", "run: dvc repro --force evaluate")
    loaded: dict[str, EvaluationRun] = {}

    def load(run: Run) -> EvaluationRun:
        if run.info.run_id not in loaded:
            loaded[run.info.run_id] = load_evaluation_run(registry, run)
        return loaded[run.info.run_id]

    for second in runs_of_b:
        for first in runs_of_a:
            if not data_mismatches(load(first), load(second)):
                return load(first), load(second)
    return load(runs_of_a[0]), load(runs_of_b[0])


def _fetch(registry: ModelRegistry, run_id: str, path: str, scratch: Path) -> str:
    """Text of an artifact; empty if the run does not have it."""
    folder, _, leaf = path.rpartition("/")
    listed = registry.call(registry.client.list_artifacts, run_id, folder)
    if not any(item.path.rsplit("/", 1)[-1] == leaf for item in listed):
        return ""
    try:
        local = registry.call(registry.client.download_artifacts, run_id, path, str(scratch))
    except EntryRejectedError as error:
        raise DataError(f"artifact {path} of run {run_id} cannot be read: {error}") from error
    return Path(local).read_text(encoding="utf-8")


def _parse_replicates(text: str) -> dict[str, DoubleArray]:
    rows = list(csv.reader(io.StringIO(text)))
    table = np.array([[_number(cell) for cell in row] for row in rows[1:]], np.float64)
    return {name: table[:, column] for column, name in enumerate(rows[0]) if len(table)}


def _item_key(row: Mapping[str, str]) -> tuple[str | None, ...]:
    return tuple(row.get(name) for name in ("set", "pair", "image_id", "sound"))


def _number(text: str | None) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        return math.nan
