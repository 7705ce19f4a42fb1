"""Comparison of two model versions: metrics on the same test items, parameters, data, and samples of the same clips."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.client.mlflow_client import run_datasets
from pipeline_steps.tracking.errors import EntryRejectedError
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from pipeline_steps.tracking.registry.evaluation_results import (
    EvaluationRun,
    MetricComparison,
    compare,
    data_mismatches,
    latest_comparable_evaluations,
)
from pipeline_steps.tracking.registry.model_registry import ModelRegistry, ModelVersionInfo
from pipeline_steps.tracking.settings import REGISTERED_MODEL

if TYPE_CHECKING:
    from mlflow.entities import Run

SAMPLES = "report/compare"
"""Artifact folder of an evaluation run with samples; file names: drawn-CLIP.png, picture-IMAGE.jpg, sound-CLIP.mp3."""


@dataclass(frozen=True, slots=True)
class FieldDiff:
    """A parameter, data set or tag that differs; an empty string means that it is missing."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class SampleComparison:
    """One clip, its real image, and the image that each model generated from it."""

    set: str  # `test` or `gold`
    name: str  # pair id
    image: bytes  # bytes of the real image; like those below empty if no run logged the file
    audio: bytes  # bytes of the clip
    a: bytes  # bytes of the image that A generated
    b: bytes  # bytes of the image that B generated
    metrics: Mapping[str, tuple[float, float]]  # metric -> values of A and B for this item


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Result of `sonify compare`."""

    a: ModelVersionInfo  # baseline
    b: ModelVersionInfo  # newer version; differences are B minus A
    metrics: Sequence[MetricComparison]  # metrics that both evaluations have
    data: Mapping[str, str]  # data set -> DVC md5 of the evaluations' data
    runs: tuple[str, str]  # the two evaluation runs
    parameters: Sequence[FieldDiff]  # differing training parameters
    provenance: Sequence[FieldDiff]  # differing training data, commits and model families
    samples: Sequence[SampleComparison]  # generated images for the same clips
    notes: Sequence[str]  # warnings of the evaluations and of the comparison

    def as_dict(self) -> dict[str, Any]:
        """Fields for JSON, without the samples."""

        def version(info: ModelVersionInfo) -> dict[str, Any]:
            return {name: getattr(info, name) for name in ("version", "md5", "run_id", "commit", "aliases")}

        return {
            "a": version(self.a),
            "b": version(self.b),
            "evaluations": list(self.runs),
            "data": dict(self.data),
            "metrics": [found.as_dict() for found in self.metrics],
            "parameters": [asdict(diff) for diff in self.parameters],
            "provenance": [asdict(diff) for diff in self.provenance],
            "notes": list(self.notes),
        }


def compare_versions(layout: ProjectPaths, first: str, second: str) -> ModelComparison:
    """Compare two versions (numbers, aliases or runs) on the same test items.

    Raises:
        DataError: a version does not exist or was never evaluated.
        IntegrityError: the versions have no comparable evaluations.
        ConfigError, ServiceError: see `ModelRegistry`.
    """
    registry = ModelRegistry(layout)
    a, b = registry.resolve(first), registry.resolve(second)
    evaluation_a, evaluation_b = latest_comparable_evaluations(registry, a, b)
    if problems := data_mismatches(evaluation_a, evaluation_b):
        raise IntegrityError(
            f"versions {a.version} and {b.version} were not evaluated on the same data: {'; '.join(problems)}",
            f"evaluate both on this project's data: sonify compare {a.version} {b.version} --evaluate",
        )
    notes = sorted({*evaluation_a.notes, *evaluation_b.notes})
    if a.md5 == b.md5:
        notes.insert(0, "both versions have the same bytes")
    run_a, run_b = registry.run(a.run_id), registry.run(b.run_id)
    return ModelComparison(
        a,
        b,
        compare(evaluation_a, evaluation_b),
        evaluation_b.data,
        (evaluation_a.run_id, evaluation_b.run_id),
        _field_diffs(run_a.data.params if run_a else {}, run_b.data.params if run_b else {}),
        _field_diffs(_provenance(registry, a, run_a), _provenance(registry, b, run_b)),
        _samples(registry, evaluation_a, evaluation_b),
        notes,
    )


def log_comparison(layout: ProjectPaths, comparison: ModelComparison, files: Mapping[str, str]) -> None:
    """Log files (name -> text) as artifacts of B's evaluation run below `compare/`."""
    registry = ModelRegistry(layout)
    folder = f"compare/{comparison.b.version}-with-{comparison.a.version}"
    for name, text in files.items():
        registry.call(registry.client.log_text, comparison.runs[1], text, f"{folder}/{name}")


def fetch_model(layout: ProjectPaths, info: ModelVersionInfo, folder: Path) -> Path:
    """Download the exported model of a version to `folder` and check its md5; returns the model's path.

    Raises:
        DataError: MLflow does not have the model any more.
        IntegrityError: the downloaded model has another md5.
    """
    registry = ModelRegistry(layout)
    import mlflow

    source = f"models:/{info.model_id}" if info.model_id else f"models:/{REGISTERED_MODEL}/{info.version}"
    try:
        local = registry.call(mlflow.artifacts.download_artifacts, source, dst_path=str(folder))
    except EntryRejectedError as error:
        raise DataError(f"version {info.version} cannot be read from MLflow: {error}", "sonify trace --checkout") from error
    model = Path(local) / "artifacts/model"
    found = hash_path(model) if model.is_dir() else "nothing"
    if found != info.md5:
        raise IntegrityError(f"version {info.version} in MLflow has DVC md5 {found}, not {info.md5}", "sonify trace --checkout")
    return model


def _provenance(registry: ModelRegistry, info: ModelVersionInfo, run: Run | None) -> dict[str, str]:
    fields = {"dvc.md5": info.md5, "git.commit": info.commit}
    fields |= {
        name: value for name, value in registry.all_tags(info).items() if name.startswith(("pairs.", "families.", "dvc.md5."))
    }
    return fields | {f"dvc.md5.{name}": digest for name, digest in run_datasets(run).items()}


def _field_diffs(a: Mapping[str, str], b: Mapping[str, str]) -> list[FieldDiff]:
    names = sorted({*a, *b})
    return [FieldDiff(name, a.get(name, ""), b.get(name, "")) for name in names if a.get(name) != b.get(name)]


def _samples(registry: ModelRegistry, a: EvaluationRun, b: EvaluationRun) -> list[SampleComparison]:
    with tempfile.TemporaryDirectory() as scratch:
        first = _download_samples(registry, a.run_id, Path(scratch) / "a")
        second = _download_samples(registry, b.run_id, Path(scratch) / "b")
    either = first | second
    rows = []
    for item, other in zip(a.items, b.items, strict=True):
        image, generated = f"picture-{item['image_id']}.jpg", f"drawn-{item['sound']}.png"
        # The image is missing if another item of the same clip was logged.
        if image not in either or generated not in either or item["set"] not in {"test", "gold"}:
            continue
        metrics = {
            column.removesuffix(".model"): (float(item[column]), float(other[column]))
            for column in item
            if column.endswith(".model") and item[column] and other.get(column)
        }
        audio = either.get(f"sound-{item['sound']}.mp3", b"")
        generated_a, generated_b = first.get(generated, b""), second.get(generated, b"")
        rows.append(SampleComparison(item["set"], item["pair"], either[image], audio, generated_a, generated_b, metrics))
    return rows


def _download_samples(registry: ModelRegistry, run_id: str, target: Path) -> dict[str, bytes]:
    """File name -> bytes of the samples that an evaluation run logged."""
    if not registry.call(registry.client.list_artifacts, run_id, SAMPLES):
        return {}
    target.mkdir()
    local = Path(registry.call(registry.client.download_artifacts, run_id, SAMPLES, str(target)))
    return {path.name: path.read_bytes() for path in sorted(local.iterdir()) if path.is_file()}
