"""Model logging: uploads an exported model as a pyfunc, registers it, and attaches evaluation metrics to it.

The model is logged from code, nothing is pickled. An evaluation finds its model by content: DVC's md5 of the exported folder is
a tag of the logged model. The md5 is the same for a trained folder and for one restored from DVC's cache.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_steps.tracking.client.mlflow_client import MlflowStore, run_datasets
from pipeline_steps.tracking.client.offline_queue import OfflineQueue, pending_model
from pipeline_steps.tracking.client.pipeline_run import EXPERIMENT_TAG
from pipeline_steps.tracking.errors import EntryRejectedError, StoreUnavailableError
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from pipeline_steps.tracking.settings import CHALLENGER, REGISTERED_MODEL

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

MD5_TAG = "dvc.md5"
ENTRY_TAG = "sonify.entry"
LOGGED_TAG = "sonify.logged"
"""Time at which training logged the model, in milliseconds since 1970; the upload may happen much later."""

VERSION_TAGS = ("dataset", "seed", EXPERIMENT_TAG, "git.commit", MD5_TAG, ENTRY_TAG, LOGGED_TAG)
"""Tags of a model version; the logged model has all of them."""
VERDICT_TAG = "evaluation"

REQUIREMENTS = (
    "diffusers", "lightning", "mlflow", "numpy", "pandas", "pillow", "safetensors", "scipy", "soundfile", "soxr", "torch",
    "transformers",
)  # fmt: skip
"""Packages that serving needs, pinned to the versions that trained the model."""


def signature() -> ModelSignature:
    """Signature of the served model; see `pyfunc_model.py` for columns and parameters."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "audio_base64")]),
        outputs=Schema([ColSpec(DataType.string, "png_base64")]),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("guidance_scale", DataType.double, -1.0),
                ParamSpec("num_samples", DataType.long, 1),
                ParamSpec("num_inference_steps", DataType.long, 0),
            ]
        ),
    )


def log_model(store: MlflowStore, queue: OfflineQueue, run_id: str, entry: dict[str, Any], copy: Path) -> None:
    """Upload, verify and register the model copied to `copy/model`, with its code in `copy/code`.

    Repeatable: a complete model is not uploaded again, and a partial upload is marked as failed and replaced. The version is
    created after every file of the upload was checked.

    Raises:
        StoreUnavailableError: the store is unavailable or the upload is incomplete.
        EntryRejectedError: the copy has changed since it was logged.
    """
    folder = copy / "model"
    if hash_path(folder) != entry["digest"]:
        raise EntryRejectedError(f"{folder} has changed since it was logged")
    run = store.call(store.client.get_run, run_id)
    run_tags = ("git.commit", "git.dirty", "dvc.stage", "dvc.inputs", "params.digest")
    tags = {key: value for key, value in run.data.tags.items() if key in run_tags}
    tags |= {f"{MD5_TAG}.{name}": digest for name, digest in run_datasets(run).items()}
    tags |= entry.get("tags", {})
    tags |= {MD5_TAG: entry["digest"], "dvc.path": entry["path"], ENTRY_TAG: f"{queue.key}:{entry['file']}"}
    tags[LOGGED_TAG] = str(entry["time"])
    model = _ready_model(store, tags[ENTRY_TAG]) or _upload_model(store, run, tags, copy)
    _register(store, run_id, model, tags)


def _ready_model(store: MlflowStore, entry_tag: str) -> LoggedModel | None:
    from mlflow.entities import LoggedModelStatus

    ready = None
    for found in _search(store, f"tags.`{ENTRY_TAG}` = '{entry_tag}'"):
        if found.status == LoggedModelStatus.READY:
            ready = found
        elif found.status != LoggedModelStatus.FAILED:
            store.call(store.client.finalize_logged_model, found.model_id, "FAILED")
    return ready


def _upload_model(store: MlflowStore, run: Any, tags: dict[str, str], copy: Path) -> LoggedModel:
    import mlflow
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    client, run_id = store.client, run.info.run_id
    model: LoggedModel = store.call(
        client.create_logged_model,
        store.experiment_id(),
        name=REGISTERED_MODEL,
        source_run_id=run_id,
        tags=tags,
        params=dict(run.data.params),
        model_type="audio-to-image",
    )
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "model"
        mlflow.pyfunc.save_model(
            path=str(local),
            mlflow_model=Model(model.artifact_location, run_id=run_id, model_uuid=model.model_id, model_id=model.model_id),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": str(copy / "model")},
            code_paths=[str(copy / "code" / "pipeline_steps")],
            signature=signature(),
            pip_requirements=_requirements(),
        )
        store.call(client.log_model_artifacts, model.model_id, str(local))
        expected = {path.relative_to(local).as_posix(): path.stat().st_size for path in local.rglob("*") if path.is_file()}
        uploaded = _list_artifacts(store, model.model_id)
        if missing := sorted(name for name, size in expected.items() if uploaded.get(name, -1) not in {size, None}):
            raise StoreUnavailableError(f"upload of model {model.model_id} is incomplete: {missing[0]}")
    store.call(client.log_outputs, run_id, [LoggedModelOutput(model.model_id, step=0)])
    return store.call(client.finalize_logged_model, model.model_id, "READY")


def _list_artifacts(store: MlflowStore, model_id: str) -> dict[str, int | None]:
    """Artifact files of a logged model with their size in bytes (None if the store does not list sizes)."""
    found: dict[str, int | None] = {}
    folders: list[str | None] = [None]
    while folders:
        for item in store.call(store.client.list_logged_model_artifacts, model_id, folders.pop()):
            if item.is_dir:
                folders.append(item.path)
            else:
                found[item.path] = item.file_size
    return found


def _register(store: MlflowStore, run_id: str, model: LoggedModel, tags: dict[str, str]) -> None:
    client, name = store.client, REGISTERED_MODEL
    versions = store.call(client.search_model_versions, f"name = '{name}'", max_results=10_000)
    registered = (found for found in versions if found.run_id == run_id and found.tags.get(ENTRY_TAG) == tags[ENTRY_TAG])
    version = next(registered, None)
    if version is None:
        with suppress(EntryRejectedError):  # it exists
            store.call(client.create_registered_model, name, description="Audio-to-image diffusion model.")
        version = store.call(
            client.create_model_version,
            name,
            source=f"models:/{model.model_id}",
            run_id=run_id,
            tags={name: tags[name] for name in VERSION_TAGS if name in tags},
            model_id=model.model_id,
            await_creation_for=0,
        )
    if not any(_logged_at(found) > int(tags[LOGGED_TAG]) for found in versions):  # an older model may be uploaded later
        store.call(client.set_registered_model_alias, name, CHALLENGER, version.version)


def _logged_at(version: ModelVersion) -> int:
    return int(version.tags.get(LOGGED_TAG, version.creation_timestamp))


def find_model(store: MlflowStore, digest: str) -> LoggedModel | None:
    """Newest logged model whose exported folder has this DVC md5; None if there is none."""
    from mlflow.entities import LoggedModelStatus

    found = [model for model in _search(store, f"tags.`{MD5_TAG}` = '{digest}'") if model.status == LoggedModelStatus.READY]
    return max(found, key=lambda model: model.creation_timestamp, default=None)


def log_model_metrics(store: MlflowStore, queue: OfflineQueue, run_id: str, entry: dict[str, Any]) -> None:
    """Attach an evaluation's metrics to the model with the evaluated bytes, with name and digest of the test data.

    They are also logged to the run that trained the model, because the registry's comparison of versions shows that run, and
    described in the versions of the model.

    Raises:
        StoreUnavailableError: another queue still holds that model.
        EntryRejectedError: no such model was logged (it was trained without tracking).
    """
    from mlflow.entities import Metric

    pending = pending_model(queue, entry["digest"])  # before the search: another process may upload the model in between
    model = find_model(store, entry["digest"])
    if model is None:
        if pending:
            raise StoreUnavailableError(f"the evaluated model is still in queue {pending}")
        raise EntryRejectedError(f"no logged model has dvc.md5 {entry['digest']}; it was trained without tracking")
    data = entry.get("dataset") or {}
    subject = {"model_id": model.model_id, "dataset_name": data.get("name"), "dataset_digest": data.get("digest")}
    rows = [Metric(key, value, entry["time"], 0, **subject, run_id=run_id) for key, value in entry["values"].items()]
    for start in range(0, len(rows), 500):
        store.call(store.client.log_batch, run_id, metrics=rows[start : start + 500])
    store.call(store.client.set_tag, run_id, "model_id", model.model_id)
    if model.source_run_id:
        plain = [Metric(key, value, entry["time"], 0) for key, value in entry["values"].items()]
        store.call(store.client.log_batch, model.source_run_id, metrics=plain)
    warnings = entry.get("warnings", ())
    text = describe_evaluation(entry["values"], warnings, f"#/experiments/{model.experiment_id}/runs/{run_id}/artifacts")
    for version in store.call(store.client.search_model_versions, f"name = '{REGISTERED_MODEL}'", max_results=10_000):
        if version.source == f"models:/{model.model_id}":
            store.call(store.client.update_model_version, version.name, version.version, description=text)
            verdict = "not above chance" if warnings else "above chance"
            store.call(store.client.set_model_version_tag, version.name, version.version, VERDICT_TAG, verdict)


def describe_evaluation(values: Mapping[str, float], warnings: Sequence[str], page: str) -> str:
    """Description of a model version in Markdown: warnings, numbers with their intervals, link to the evaluation run. Pure."""
    lines = [f"**Warning**: {warning}" for warning in warnings]
    for name, value in values.items():
        low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
        if not name.endswith(("_low", "_high")):
            interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
            lines.append(f"- {name} {value:.4g}{interval}")
    return "\n".join([*lines, "", f"[Evaluation and report]({page})"])


def _search(store: MlflowStore, query: str) -> list[LoggedModel]:
    return list(store.call(store.client.search_logged_models, [store.experiment_id()], filter_string=query))


def _requirements() -> list[str]:
    pins = []
    for package in REQUIREMENTS:
        with suppress(importlib.metadata.PackageNotFoundError):
            pins.append(f"{package}=={importlib.metadata.version(package).split('+')[0]}")
    return pins
