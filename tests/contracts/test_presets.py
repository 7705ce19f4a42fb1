"""Presets: each is whole and valid, and names every model of the hub by a commit that cannot move."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline_steps.core.config import config_class, load_params, parse_section

PROJECT = Path(__file__).resolve().parents[2]
PRESETS = sorted((PROJECT / "presets").glob("*.yaml"))


def keys(node: Any, path: str = "") -> set[str]:
    """Every key, with the keys above it."""
    if not isinstance(node, dict):
        return {path}
    return {found for name, value in node.items() for found in keys(value, f"{path}.{name}")} | {path}


def checkpoints(node: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Every (model, revision) that is named."""
    found = {}
    if isinstance(node, dict):
        if node.get("model") and "revision" in node:
            found[path] = (node["model"], node["revision"])
        for name, value in node.items():
            found |= checkpoints(value, f"{path}.{name}")
    return found


def test_the_presets_that_the_documentation_names_are_there() -> None:
    assert {path.stem for path in PRESETS} == {"embedded", "full", "full-ray"}
    assert (PROJECT / "params.yaml").read_bytes() == (PROJECT / "presets/embedded.yaml").read_bytes()


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_valid_and_differs_in_values_alone(path: Path) -> None:
    params = load_params(path)
    for section in params:
        config = config_class(section)
        assert parse_section(config, section, params)
    embedded = load_params(PROJECT / "presets/embedded.yaml")
    assert keys(params) == keys(embedded)
    assert list(params) == list(embedded)


def test_full_names_pinned_models_for_every_role() -> None:
    found = checkpoints(load_params(PROJECT / "presets/full.yaml"))
    roles = {".caption.vlm", ".embed.clap", ".train.audio.ast", ".train.ip_adapter.backbone", ".evaluate.checkpoints.dinov2"}
    assert set(found) == roles
    for model, revision in found.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model), model
        assert re.fullmatch(r"[0-9a-f]{40}", revision), (model, revision)
    documented = (PROJECT / "docs/models.md").read_text(encoding="utf-8")
    for model, revision in found.values():
        assert f"`{model}`" in documented, model
        assert revision[:12] in documented, model


def test_full_ray_is_full_on_a_cluster() -> None:
    full, ray = (load_params(PROJECT / f"presets/{name}.yaml") for name in ("full", "full-ray"))
    for section in ("caption", "embed"):
        assert ray[section].pop("executor") == "ray"
        assert full[section].pop("executor") == "local"
        assert ray[section].pop("ray")["address"]
        full[section].pop("ray")
    assert ray == full
