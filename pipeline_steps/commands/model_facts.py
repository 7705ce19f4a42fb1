"""Identity of a trained model: digest, commit, pairs, parameters and evaluation, of the project or of a registered version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_steps.core.errors import ConfigError, IntegrityError, StageError
from pipeline_steps.core.project_paths import ProjectPaths


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts that identify a model.

    Attributes:
        md5: DVC's md5 of the model folder.
        version: number in the registry; empty if the model is not a registered version.
        commit: git commit at training; empty if unknown.
        pairs_md5: DVC's md5 of the pairs that the model was trained on; empty if unknown.
        metrics: "set/metric" -> value, low, high, n.
        parameters: section `train` of the project.
    """

    md5: str
    version: str = ""
    commit: str = ""
    pairs_md5: str = ""
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)


def project_facts(layout: ProjectPaths) -> ModelFacts:
    """Facts of the project's model. The evaluation is used if it is one of these bytes.

    Raises:
        IntegrityError: the model differs from `dvc.lock`.
    """
    from pipeline_steps.core.config import load_params
    from pipeline_steps.core.git import try_git
    from pipeline_steps.tracking.lineage.dvc_digests import hash_path, read_lock, relative

    name, pairs = relative(layout, layout.model), relative(layout, layout.pairs)
    md5 = hash_path(layout.model)
    stages = read_lock(layout.lock).get("stages", {})
    trained, evaluated = stages.get("train", {}), stages.get("evaluate", {})
    recorded = _md5s(trained.get("outs")).get(name)
    if recorded not in (None, md5):
        raise IntegrityError(f"{name}: md5 is {md5}, dvc.lock has {recorded}", "dvc checkout, or dvc repro train")
    report = layout.reports / "evaluation.json"
    metrics: dict[str, Mapping[str, Any]] = {}
    if report.is_file() and _md5s(evaluated.get("deps")).get(name) == md5:
        metrics = model_metrics(json.loads(report.read_text(encoding="utf-8")))
    params = load_params(layout.params) if layout.params.is_file() else {}
    commit = try_git(layout.root, "log", "-1", "--format=%H", "--", "dvc.lock") or ""
    return ModelFacts(md5, "", commit.strip(), _md5s(trained.get("deps")).get(pairs, ""), metrics, params.get("train", {}))


def registered_facts(layout: ProjectPaths, model: str) -> ModelFacts:
    """Facts of a registered version, with the newest evaluation of its bytes.

    Raises:
        ConfigError: `model` is a folder.
        DataError, ServiceError: as `ModelRegistry.resolve`.
    """
    from pipeline_steps.tracking.client.mlflow_client import run_datasets
    from pipeline_steps.tracking.lineage.dvc_digests import relative
    from pipeline_steps.tracking.registry.evaluation_results import load_evaluation_run
    from pipeline_steps.tracking.registry.model_registry import ModelRegistry

    if Path(model).is_dir():
        raise ConfigError(f"--version {model} is a folder", "name a version, alias or run; without it: the project's model")
    registry = ModelRegistry(layout)
    info = registry.resolve(model)
    run = registry.run(info.run_id)
    evaluations = registry.evaluations(info)
    metrics = load_evaluation_run(registry, evaluations[0]).values if evaluations else {}
    pairs = run_datasets(run).get(relative(layout, layout.pairs), "")
    return ModelFacts(info.md5, info.version, info.commit, pairs, metrics, dict(run.data.params) if run else {})


def _md5s(entries: Sequence[Mapping[str, Any]] | None) -> dict[str, str]:
    return {str(entry["path"]): str(entry.get("md5", "")) for entry in entries or ()}


def model_metrics(evaluation: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Results of the row `model` of `evaluation.json`: "set/metric" -> entry."""
    found = {}
    for name, block in evaluation.items():
        if isinstance(block, Mapping) and isinstance(block.get("rows"), Mapping):
            found.update({f"{name}/{metric}": entry for metric, entry in block["rows"].get("model", {}).items()})
    return found


def version_of(layout: ProjectPaths, md5: str) -> str:
    """Registered version with these bytes and its aliases, e.g. `3 (challenger)`; empty if there is none or no registry."""
    from pipeline_steps.tracking.registry.model_registry import ModelRegistry
    from pipeline_steps.tracking.settings import read_settings

    settings = read_settings(layout)
    if settings.mode == "off" or settings.is_missing:
        return ""
    try:
        info = ModelRegistry(layout).resolve(md5)
    except StageError:
        return ""
    return f"{info.version} ({', '.join(info.aliases)})" if info.aliases else info.version
