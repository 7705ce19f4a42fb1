"""Two model versions beside each other: numbers on the same test items, parameters, data, and drawings of the same sounds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.errors import EntryRejectedError
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from pipeline_steps.tracking.registry.evaluation_results import (
    EvaluationRun,
    MetricComparison,
    compare,
    data_mismatches,
    latest_comparable_evaluations,
)
from pipeline_steps.tracking.registry.model_registry import ModelRegistry, ModelVersionInfo, run_datasets
from pipeline_steps.tracking.settings import REGISTERED_MODEL

SAMPLES = "report/compare"


@dataclass(frozen=True, slots=True)
class FieldDiff:
    """A parameter, data set or tag that differs; an empty text means it is not there."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class SampleComparison:
    """One sound, its real picture, and what each model drew from it (file bytes; empty when a run kept none).

    `rates`: metric -> (A's, B's) value of this very item.
    """

    set: str
    name: str
    picture: bytes
    sound: bytes
    a: bytes
    b: bytes
    rates: Mapping[str, tuple[float, float]]


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Everything `sonify compare` shows.

    Attributes:
        a, b: the two versions; differences are B minus A.
        metrics: every metric of both evaluations.
        data: what both were judged on: data set -> DVC md5.
        runs: their evaluation runs.
        parameters, made_of: how they were trained, and on what: only what differs.
        samples: drawings of the same sounds.
        notes: what a reader must know.
    """

    a: ModelVersionInfo
    b: ModelVersionInfo
    metrics: Sequence[MetricComparison]
    data: Mapping[str, str]
    runs: tuple[str, str]
    parameters: Sequence[FieldDiff]
    made_of: Sequence[FieldDiff]
    samples: Sequence[SampleComparison]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain form for JSON, without the drawings."""

        def plain(info: ModelVersionInfo) -> dict[str, Any]:
            return {
                "version": info.version,
                "md5": info.md5,
                "run_id": info.run_id,
                "commit": info.commit,
                "aliases": list(info.aliases),
            }

        return {
            "a": plain(self.a),
            "b": plain(self.b),
            "evaluations": list(self.runs),
            "data": dict(self.data),
            "metrics": [found.as_dict() for found in self.metrics],
            "parameters": [{"name": c.name, "a": c.a, "b": c.b} for c in self.parameters],
            "made_of": [{"name": c.name, "a": c.a, "b": c.b} for c in self.made_of],
            "notes": list(self.notes),
        }


def compare_versions(layout: ProjectPaths, first: str, second: str) -> ModelComparison:
    """Compare two versions (numbers, aliases or runs) on the items that both were judged on.

    Raises:
        DataError: there is no such version, or it was never evaluated.
        IntegrityError: they were not judged on the same data in the same way.
        ConfigError, ServiceError: see `Registry`.
    """
    registry = ModelRegistry(layout)
    a, b = registry.resolve(first), registry.resolve(second)
    judged_a, judged_b = latest_comparable_evaluations(registry, a, b)
    if problems := data_mismatches(judged_a, judged_b):
        raise IntegrityError(
            f"versions {a.version} and {b.version} were not judged on the same data: {'; '.join(problems)}",
            f"sonify compare {a.version} {b.version} --evaluate judges both on this folder's data first",
        )
    notes = sorted({*judged_a.notes, *judged_b.notes})
    if a.md5 == b.md5:
        notes.insert(0, "both versions hold the same bytes")
    return ModelComparison(
        a,
        b,
        compare(judged_a, judged_b),
        judged_b.data,
        (judged_a.run_id, judged_b.run_id),
        _changes(_parameters(registry, a), _parameters(registry, b)),
        _changes(_made_of(registry, a), _made_of(registry, b)),
        _samples(registry, judged_a, judged_b),
        notes,
    )


def log_comparison(layout: ProjectPaths, comparison: ModelComparison, files: Mapping[str, str]) -> None:
    """Log files (name -> text) as artifacts of B's evaluation run, below `compare/`."""
    registry = ModelRegistry(layout)
    folder = f"compare/{comparison.b.version}-with-{comparison.a.version}"
    for name, text in files.items():
        registry.call(lambda name=name, text=text: registry.client.log_text(comparison.runs[1], text, f"{folder}/{name}"))  # type: ignore[misc]


def fetch_model(layout: ProjectPaths, info: ModelVersionInfo, folder: Path) -> Path:
    """The exported model of a version, from MLflow, below `folder`; its bytes are checked against its md5.

    Raises:
        DataError: MLflow does not hold it any more.
        IntegrityError: it holds other bytes.
    """
    registry = ModelRegistry(layout)
    import mlflow

    source = f"models:/{info.model_id}" if info.model_id else f"models:/{REGISTERED_MODEL}/{info.version}"
    try:
        local = registry.call(lambda: mlflow.artifacts.download_artifacts(source, dst_path=str(folder)))
    except EntryRejectedError as error:
        raise DataError(f"version {info.version} cannot be read from MLflow: {error}", "sonify trace --checkout") from error
    model = Path(local) / "artifacts/model"
    found = hash_path(model) if model.is_dir() else "nothing"
    if found != info.md5:
        raise IntegrityError(f"version {info.version} in MLflow has DVC md5 {found}, not {info.md5}", "sonify trace --checkout")
    return model


def _parameters(registry: ModelRegistry, info: ModelVersionInfo) -> dict[str, str]:
    if not info.run_id:
        return {}
    try:
        return dict(registry.call(lambda: registry.client.get_run(info.run_id)).data.params)
    except (EntryRejectedError, DataError):  # the run was deleted; the version outlives it
        return {}


def _made_of(registry: ModelRegistry, info: ModelVersionInfo) -> dict[str, str]:
    facts = {"dvc.md5": info.md5, "git.commit": info.commit}
    facts |= {name: value for name, value in info.tags.items() if name.startswith(("pairs.", "families.", "dvc.md5."))}
    if info.run_id:
        try:
            run = registry.call(lambda: registry.client.get_run(info.run_id))
            facts |= {f"dvc.md5.{name}": digest for name, digest in run_datasets(run).items()}
        except (EntryRejectedError, DataError):
            return facts
    return facts


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> list[FieldDiff]:
    names = sorted({*a, *b})
    return [FieldDiff(name, a.get(name, ""), b.get(name, "")) for name in names if a.get(name) != b.get(name)]


def _samples(registry: ModelRegistry, a: EvaluationRun, b: EvaluationRun) -> list[SampleComparison]:
    with tempfile.TemporaryDirectory() as scratch:
        first = _folder(registry, a.run_id, Path(scratch) / "a")
        second = _folder(registry, b.run_id, Path(scratch) / "b")
        rows = []
        for item, other in zip(a.items, b.items, strict=True):
            name = f"drawn-{item['sound']}.png"
            if (name not in first and name not in second) or item["set"] not in {"test", "gold"}:
                continue
            picture = f"picture-{item['image_id']}.jpg"
            if picture not in first | second:  # another item of the same sound was the one kept
                continue
            rates = {
                column.removesuffix(".model"): (float(item[column]), float(other[column]))
                for column in item
                if column.endswith(".model") and item[column] and other.get(column)
            }
            sound = f"sound-{item['sound']}.mp3"
            rows.append(
                SampleComparison(
                    item["set"],
                    item["pair"],
                    second.get(picture) or first.get(picture, b""),
                    second.get(sound) or first.get(sound, b""),
                    first.get(name, b""),
                    second.get(name, b""),
                    rates,
                )
            )
    return rows


def _folder(registry: ModelRegistry, run_id: str, target: Path) -> dict[str, bytes]:
    """Files of the samples folder of a run, by name."""
    if not registry.call(lambda: registry.client.list_artifacts(run_id, SAMPLES)):
        return {}
    target.mkdir()
    local = Path(registry.call(lambda: registry.client.download_artifacts(run_id, SAMPLES, str(target))))
    return {path.name: path.read_bytes() for path in sorted(local.iterdir()) if path.is_file()}
