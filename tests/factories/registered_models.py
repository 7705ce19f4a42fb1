"""Model versions with evaluations in MLflow, as the stages log them, without any training."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.tracking.settings import REGISTERED_MODEL, read_settings

if TYPE_CHECKING:
    from mlflow import MlflowClient

GATE = """
promotion:
  improve:
    - {metric: test/win_rate_toy, least: 0.02}
  must_not_worsen:
    - {metric: test/kid_toy, tolerance: 0.01}
  least_clusters: 5
"""
PAIRS = f"{1:032x}.dir"


def md5_of(version: int) -> str:
    """DVC md5 of a version's model."""
    return f"{1000 + version:032x}.dir"


def write_gate(layout: ProjectPaths, text: str = GATE) -> None:
    (layout.root / "infra").mkdir(parents=True, exist_ok=True)
    (layout.root / "infra/gate.yaml").write_text(text)


def client_of(layout: ProjectPaths) -> MlflowClient:
    from pipeline_steps.tracking.client.mlflow_client import MlflowStore

    return MlflowStore(read_settings(layout), 30).client


def register(
    layout: ProjectPaths,
    rates: Sequence[float],
    *,
    kid: float = 0.1,
    pairs: str = PAIRS,
    version: int,
    protocol: dict[str, Any] | None = None,
    run_params: dict[str, str] | None = None,
) -> str:
    """Register the next version with an evaluation in which item i has win rate `rates[i]`; returns the evaluation run's id."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    client = client_of(layout)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "seeing-sound")
    found = client.get_experiment_by_name(name)
    location = (layout.root / "mlartifacts").resolve().as_uri()
    experiment = found.experiment_id if found else client.create_experiment(name, artifact_location=location)
    if version == 1:
        client.create_registered_model(REGISTERED_MODEL)
    training = client.create_run(experiment, run_name="train").info.run_id
    for key, value in (run_params or {}).items():
        client.log_param(training, key, value)
    evaluation = client.create_run(experiment, run_name="evaluate").info.run_id

    def log_input(run: str, path: str, digest: str) -> None:
        client.log_inputs(run, [DatasetInput(Dataset(path, digest, "local", "{}"), [InputTag("mlflow.data.context", "x")])])

    log_input(training, "data/pairs", pairs)
    log_input(evaluation, "data/pairs", pairs)
    log_input(evaluation, "models/audio2image", md5_of(version))
    client.log_text(evaluation, json.dumps(report(rates, kid, protocol or {})), "report/evaluation.json")
    client.log_text(evaluation, items(rates), "report/plots/per_pair.csv")
    client.log_text(evaluation, replicates(kid), "report/plots/bootstrap.csv")
    client.set_terminated(training)
    client.set_terminated(evaluation)
    created = client.create_model_version(
        REGISTERED_MODEL,
        source=f"runs:/{training}/model",
        run_id=training,
        tags={"dvc.md5": md5_of(version), "git.commit": "c" * 40},
    )
    assert int(created.version) == version
    client.set_registered_model_alias(REGISTERED_MODEL, "challenger", str(version))
    return str(evaluation)


def report(rates: Sequence[float], kid: float, protocol: dict[str, Any]) -> dict[str, Any]:
    count = {"n": len(rates), "clusters": len(rates)}
    mean = sum(rates) / len(rates)
    row = {
        "win_rate_toy": {"value": mean, "low": mean - 0.005, "high": mean + 0.005, **count},
        "kid_toy": {"value": kid, **count},
    }
    row["fd_toy"] = {"value": 10 * kid, **count}
    shared = {"num_bootstrap": 200, "seed": 0, "samples_per_audio": 4, "guidance_scale": kid}
    return {"test": {"rows": {"model": row}}, "protocol": shared | protocol, "warnings": ["test: few sounds"]}


def items(rates: Sequence[float]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["set", "pair", "image_id", "sound", "cluster", "win_rate_toy.model"])
    writer.writerows(["test", f"p{i}", f"i{i}", f"s{i}", f"c{i}", rate] for i, rate in enumerate(rates))
    return stream.getvalue()


def replicates(kid: float) -> str:
    """Bootstrap replicates with the same resampling for every model, as stage `evaluate` writes them."""
    return "test/kid_toy\n" + "".join(f"{kid + 0.001 * (number % 7 - 3):.6f}\n" for number in range(200))
