"""Presets: each is a valid overlay, and names every model of the hub by a commit that cannot move."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline_steps.core.config import load_params
from pipeline_steps.core.presets import flatten, load_overlay, merge, preset_names, validate_params

PROJECT = Path(__file__).resolve().parents[2]
PARAMS = load_params(PROJECT / "params.yaml")


def with_preset(name: str) -> dict[str, Any]:
    """Parameters of the project with a preset."""
    params = load_params(PROJECT / "params.yaml")
    merge(params, load_overlay(PROJECT, name))
    return params


def checkpoints(node: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Every (model, revision) that is named."""
    found = {}
    if isinstance(node, dict):
        if node.get("model") and "revision" in node:
            found[path] = (node["model"], node["revision"])
        for name, value in node.items():
            found |= checkpoints(value, f"{path}.{name}")
    return found


def test_the_presets_that_the_documentation_names_exist() -> None:
    assert preset_names(PROJECT) == ("embedded", "full", "full-ray", "trial")


@pytest.mark.parametrize("name", preset_names(PROJECT))
def test_a_preset_is_valid_and_sets_known_keys(name: str) -> None:
    params = with_preset(name)
    validate_params(params, "")
    known = dict(flatten(PARAMS))
    unknown = [key for key, _ in flatten(load_overlay(PROJECT, name)) if key not in known]
    assert not unknown, f"params.yaml writes out every key: {unknown}"


@pytest.mark.parametrize("name", ["full", "full-ray", "trial"])
def test_a_preset_lists_only_what_differs(name: str) -> None:
    known = dict(flatten(PARAMS))
    same = [key for key, value in flatten(load_overlay(PROJECT, name)) if known[key] == value]
    assert not same


def test_embedded_undoes_every_other_preset() -> None:
    assert with_preset("embedded") == PARAMS
    for name in preset_names(PROJECT):
        params = with_preset(name)
        merge(params, load_overlay(PROJECT, "embedded"))
        assert params == PARAMS, name


def test_full_names_pinned_models_for_every_role() -> None:
    found = checkpoints(load_overlay(PROJECT, "full"))
    assert {path.split(".")[1] for path in found} == {"caption", "embed", "train", "evaluate"}
    assert len(found) == 5
    for model, revision in found.values():
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model), model
        assert re.fullmatch(r"[0-9a-f]{40}", revision), (model, revision)
    documented = (PROJECT / "docs/reference/models.md").read_text(encoding="utf-8")
    for model, revision in found.values():
        assert f"`{model}`" in documented, model
        assert revision[:12] in documented, model


def test_full_ray_is_full_on_a_cluster() -> None:
    full, ray = with_preset("full"), with_preset("full-ray")
    for section in ("caption", "embed"):
        assert ray[section].pop("executor") == "ray"
        assert full[section].pop("executor") == "local"
        assert ray[section].pop("ray")["address"]
        full[section].pop("ray")
    assert ray == full
