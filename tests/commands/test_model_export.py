"""Export of a model: card with results and licenses, stock diffusers in a process without the project, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from pipeline_steps import Audio2ImagePipeline
from pipeline_steps.commands.model_export import backbone_license, export_model
from pipeline_steps.core.errors import ConfigError, DataError, IntegrityError
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import PAIRS
from pipeline_steps.core.tables import read_table, write_table
from pipeline_steps.tracking.lineage.dvc_digests import hash_path
from tests.factories.catalog import write_catalog
from tests.factories.cli_project import IMAGES, SOUNDS, pair

PROJECT = Path(__file__).resolve().parents[2]
TONE = (0.3 * np.sin(np.arange(48_000) * 0.06)).astype(np.float32)
STOCK = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
folder, conditions, out = sys.argv[1:]
assert "pipeline_steps" not in sys.modules
pipeline = StableDiffusionPipeline.from_pretrained(f"{folder}/backbone", safety_checker=None, torch_dtype=torch.float32)
pipeline.load_ip_adapter(folder, subfolder="", weight_name="ip_adapter.safetensors", image_encoder_folder=None)
arguments = load_file(conditions)
embeds = arguments.pop("ip_adapter_image_embeds")
image = pipeline(
    **arguments, ip_adapter_image_embeds=[embeds], num_inference_steps=2, guidance_scale=2.0, height=32, width=32,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save(out)
"""


@pytest.fixture
def project(tmp_path: Path, demo: Path, exported_model: Path) -> ProjectPaths:
    """A project with a model, its pairs and an evaluation, as `dvc.lock` records them."""
    layout = ProjectPaths(tmp_path / "project")
    ids = write_catalog(layout, demo, IMAGES, SOUNDS)
    rows = [pair(ids, "i-dog-000", "s-dog-000", "train"), pair(ids, "i-cow-000", "s-cow-000", "test")]
    for row in rows:
        row |= {"license": "CC-BY-4.0", "image_license": "CC0-1.0", "audio_license": "CC-BY-4.0"}
    write_table(layout.pairs / "pairs.parquet", PAIRS, rows)
    shutil.copytree(exported_model, layout.model)
    write_evaluation(layout)
    write_lock(layout)
    return layout


def write_evaluation(layout: ProjectPaths) -> None:
    entry = {"value": 0.71, "low": 0.6, "high": 0.8, "n": 40}
    evaluation = {
        "protocol": {"seed": 0},
        "test": {"rows": {"model": {"win_rate_ssd": entry, "density": entry, "kid_ssd": {"value": None}}, "real": {}}},
        "gold": {"rows": {"model": {"win_rate_ssd": {"value": 0.5, "n": 3}}}},
    }
    layout.reports.mkdir(parents=True, exist_ok=True)
    (layout.reports / "evaluation.json").write_text(json.dumps(evaluation))


def write_lock(layout: ProjectPaths) -> None:
    model = {"path": "models/audio2image", "md5": hash_path(layout.model)}
    pairs = {"path": "data/pairs", "md5": hash_path(layout.pairs)}
    stages = {"train": {"cmd": "x", "deps": [pairs], "outs": [model]}, "evaluate": {"cmd": "x", "deps": [dict(model)]}}
    YAML().dump({"schema": "2.0", "stages": stages}, layout.lock)


def card_of(folder: Path) -> Any:
    return ModelCard((folder / "README.md").read_text())


def test_card_has_results_licenses_and_identity(project: ProjectPaths, tmp_path: Path) -> None:
    exported = export_model(project, tmp_path / "out", None, private=False, publish=True)
    card = card_of(tmp_path / "out")
    results = {(result.dataset_split, result.metric_type): result for result in card.data.eval_results}
    assert set(results) == {("test", "win_rate_ssd"), ("gold", "win_rate_ssd")}
    assert results["test", "win_rate_ssd"].metric_value == 0.71
    assert results["test", "win_rate_ssd"].metric_args == {"low": 0.6, "high": 0.8, "n": 40}
    assert results["test", "win_rate_ssd"].dataset_revision == hash_path(project.pairs)
    assert exported.data_licenses == {"CC0-1.0": 1, "CC-BY-4.0": 1}, "works of the training pairs alone"
    assert "| CC-BY-4.0 | 1 |" in card.text
    assert "| 0.710 | 0.600 to 0.800 | 40 |" in card.text
    assert hash_path(project.model) in card.text
    shutil.rmtree(project.reports)
    assert export_model(project, tmp_path / "bare", None, private=False, publish=False).results == 0
    assert "These weights were not evaluated" in card_of(tmp_path / "bare").text


def test_results_of_other_weights_are_left_out(project: ProjectPaths, tmp_path: Path) -> None:
    lock = project.lock.read_text().splitlines()
    last = max(number for number, line in enumerate(lock) if "md5:" in line)
    lock[last] = lock[last].partition("md5:")[0] + f"md5: {'0' * 32}.dir"
    project.lock.write_text("\n".join(lock))
    assert export_model(project, tmp_path / "out", None, private=False, publish=False).results == 0


def test_stock_diffusers_loads_the_export_in_a_process_without_the_project(project: ProjectPaths, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_model(project, folder, None, private=False, publish=False)
    model = Audio2ImagePipeline.from_pretrained(folder, device="cpu")
    assert model(TONE, 48_000)[0].size == (32, 32), "the card and the index of the backbone do not disturb the loader"
    arguments = model.model.stock_arguments(TONE)  # type: ignore[attr-defined]
    arguments["ip_adapter_image_embeds"] = arguments["ip_adapter_image_embeds"][0]
    conditions, out = tmp_path / "conditions.safetensors", tmp_path / "x.png"
    save_file({name: value.contiguous() for name, value in arguments.items()}, conditions)
    command = [sys.executable, "-I", "-c", STOCK, str(folder), str(conditions), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        assert image.size == (32, 32)
        assert np.asarray(image).std() > 1


def test_a_model_of_unpublishable_works_is_only_published_privately(project: ProjectPaths, tmp_path: Path) -> None:
    rows = read_table(project.pairs / "pairs.parquet", PAIRS).to_pylist()
    for row in rows:
        row["image_license"] = None
    write_table(project.pairs / "pairs.parquet", PAIRS, rows)
    with pytest.raises(DataError, match="licenses of the training data are not known"):
        export_model(project, tmp_path / "out", None, private=False, publish=True)
    write_lock(project)
    with pytest.raises(DataError, match="1 training pairs have a work whose license is unknown"):
        export_model(project, tmp_path / "out", None, private=False, publish=True)
    assert not (tmp_path / "out").exists()
    assert export_model(project, tmp_path / "out", None, private=True, publish=True).unpublishable_pairs == 1
    card = card_of(tmp_path / "out")
    assert (card.data.license, card.data.license_name) == ("other", "private")
    assert "Do not publish this model" in card.text


def test_a_changed_model_and_a_used_folder_are_refused(project: ProjectPaths, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_model(project, tmp_path / "used", None, private=False, publish=False)
    index = project.model / "model_index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(IntegrityError, match=r"dvc\.lock has"):
        export_model(project, tmp_path / "out", None, private=False, publish=False)


def test_license_of_the_backbone(tmp_path: Path) -> None:
    layout = ProjectPaths(tmp_path)
    hub = {"backbone": {"kind": "hub", "model": "stable-diffusion-v1-5/stable-diffusion-v1-5"}}
    assert backbone_license(layout, hub) == "creativeml-openrail-m"
    assert backbone_license(layout, {"backbone": {"kind": "hub", "model": "me/mine"}}) == "unknown"
    copied = {"backbone": {"kind": "copy"}}
    assert backbone_license(layout, copied) == "unknown"
    assert "CC-BY-4.0" in backbone_license(ProjectPaths(PROJECT), copied)
