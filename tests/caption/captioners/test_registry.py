"""Captioners are found by name: built-in ones without heavy imports, and one of another package by its entry point."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from pipeline_steps.__main__ import run_stage
from pipeline_steps.caption.captioners.base import CAPTIONERS
from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.caption.stage import CaptionProcessor
from pipeline_steps.core import registry
from pipeline_steps.core.config import parse_section
from pipeline_steps.core.errors import ConfigError
from pipeline_steps.core.hashing import fingerprint
from pipeline_steps.core.project_paths import ProjectPaths
from pipeline_steps.core.schemas import ABSTAINED, EVENTS
from pipeline_steps.core.tables import read_table
from tests.factories.catalog import write_catalog
from tests.factories.checkpoints.vlm import FAMILIES

MODULE = "tests.caption.captioners.toy_captioner"
NAMES = ["bison-000", "banana-000", "hammer-000"]


@pytest.fixture
def installed_toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed package with an entry point for captioner `toy`."""

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        point = EntryPoint("toy", MODULE, group)
        return [point] if group == "seeing_sound.captioner" and name in (None, "toy") else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(CAPTIONERS, "_implementations", dict(CAPTIONERS._implementations))
    yield
    sys.modules.pop(MODULE, None)


def test_built_in_captioners() -> None:
    assert CAPTIONERS.names() == ("openai_server", "tagger", "text", "vlm")
    with pytest.raises(ConfigError, match=r"unknown captioner 'taggr' -> did you mean tagger\?"):
        parse_section(CaptionConfig, "caption", {"caption": {"captioner": "taggr"}})


def test_configurations_are_validated_without_frameworks(project: Path) -> None:
    program = """
import sys
from pathlib import Path
from pipeline_steps.caption.captioners.base import CAPTIONERS
from pipeline_steps.caption.config import CaptionConfig
from pipeline_steps.core.config import load_params, parse_section
parse_section(CaptionConfig, "caption", load_params(Path("params.yaml")))
CAPTIONERS.names()
print(sorted({"torch", "transformers", "llguidance", "safetensors", "huggingface_hub"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_captioner_of_another_package_runs_in_the_stage(installed_toy: None, tmp_path: Path, demo: Path) -> None:
    layout = ProjectPaths(tmp_path)
    ids = write_catalog(layout, demo, NAMES, [])
    layout.params.write_text("caption: {captioner: toy, toy: {min_brightness: 0.7}}\n")
    run_stage("caption", layout)
    events = read_table(layout.captions / "events.parquet", EVENTS).to_pylist()
    abstained = read_table(layout.captions / "abstained.parquet", ABSTAINED).to_pylist()
    assert {row["phrase"] for row in events} == {"a dog barking"}
    assert {row["code"] for row in abstained} == {"NO_SOUND"}
    assert {row["image_id"] for row in events + abstained} == set(ids.values())
    report = json.loads(layout.report("caption").read_text()) | json.loads(layout.runtime("caption").read_text())
    assert (report["cache_misses"], report["cache_hits"], report["n_ok"]) == (3, 0, len(events))
    meta = json.loads((layout.captions / "meta.json").read_text())
    assert (meta["captioner"], meta["families"], meta["families_complete"]) == ("toy", ["toy"], True)

    layout.params.write_text("caption: {captioner: toy, toy: {min_brightness: 0.0, phrase: a cat meowing}}\n")
    run_stage("caption", layout)
    report = json.loads(layout.report("caption").read_text()) | json.loads(layout.runtime("caption").read_text())
    assert (report["cache_misses"], report["cache_hits"], report["n_ok"]) == (0, 3, 3), "thresholds apply to cached predictions"
    again = json.loads((layout.captions / "meta.json").read_text())
    assert again["fingerprint"] != meta["fingerprint"], "the phrase is part of the fingerprint of captions"

    layout.params.write_text("caption: {captioner: toy, min_confidence: 1.0, toy: {min_brightness: 0.0}}\n")
    run_stage("caption", layout)
    abstained = read_table(layout.captions / "abstained.parquet", ABSTAINED).to_pylist()
    assert [row["code"] for row in abstained] == ["LOW_CONFIDENCE"] * 3
    with pytest.raises(ConfigError, match=r"caption\.toy\.phrases is unknown; did you mean phrase\?"):
        parse_section(CaptionConfig, "caption", {"caption": {"captioner": "toy", "toy": {"phrases": "x"}}})


def test_fingerprints_of_caches(tmp_path: Path, assets: Path) -> None:
    """A new value means that every image is captioned again: raise the `version` of the captioner in the same commit."""
    FAMILIES["qwen2_vl"](tmp_path / "tiny")
    sections = {
        "798d14d52f8db0bb": {
            "tagger": {
                "detectors": ["ssd"],
                "models": ["efficientnet_lite0"],
                "crops": ["crop", "pad"],
                "min_probability": 0.01,
            }
        },
        "e79cb49a42d73c13": {
            "captioner": "vlm",
            "vlm": {"model": "tiny", "device": "cpu"},
            "prompt": {"max_new_tokens": 99, "verify_events": True},
        },
        "471a788c53403120": {"captioner": "openai_server", "openai_server": {"model": "m"}, "max_events": 4},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data/assets").symlink_to(assets)
    for expected, section in sections.items():
        processor = CaptionProcessor(CaptionConfig.from_params(section), ProjectPaths(tmp_path))
        assert fingerprint(processor.describe()) == expected, section
