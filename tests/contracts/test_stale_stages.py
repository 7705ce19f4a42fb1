"""A change of one implementation makes only the stages that use it stale, by `dvc status` itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

DVC = str(Path(sys.executable).with_name("dvc"))


def dvc(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    return subprocess.run([DVC, *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def up_to_date(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program and its graph, with outputs of a few bytes that DVC believes to be current."""
    folder = tmp_path_factory.mktemp("graph")
    for name in ("dvc.yaml", "params.yaml", "assets.toml"):
        shutil.copy(project / name, folder / name)
    shutil.copytree(project / "pipeline_steps", folder / "pipeline_steps", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "backbone/weights").mkdir(parents=True)
    (folder / "backbone/weights/model_index.json").write_text("{}")
    (folder / "data/demo").mkdir(parents=True)
    (folder / "data/demo/manifest.csv").write_text("kind,file\n")
    for stage in YAML(typ="safe").load((folder / "dvc.yaml").read_text())["stages"].values():
        for out in [*stage["outs"], *stage.get("metrics", [])]:
            target = folder / (next(iter(out)) if isinstance(out, dict) else out)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("{}")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    dvc(folder, "init", "--quiet")
    dvc(folder, "commit", "--force", "--quiet")
    assert json.loads(dvc(folder, "status", "--json")) == {}
    return folder


@pytest.mark.parametrize(
    ("path", "stages"),
    [
        ("evaluate/judges/a_new_judge.py", {"evaluate"}),
        ("evaluate/judges/dinov2.py", {"evaluate"}),
        ("caption/captioners/a_new_captioner.py", {"caption"}),
        ("caption/captioners/vlm.py", {"caption"}),
        ("models/text_audio/a_new_encoder.py", {"embed", "evaluate"}),
        ("retrieve/index/a_new_index.py", {"retrieve"}),
        ("train/recipes/a_new_recipe/__init__.py", {"train"}),
    ],
)
def test_a_changed_implementation_makes_its_stages_stale(up_to_date: Path, path: str, stages: set[str]) -> None:
    target = up_to_date / "pipeline_steps" / path
    before = target.read_bytes() if target.exists() else None
    target.parent.mkdir(exist_ok=True)
    target.write_bytes((before or b"") + b"\n# changed\n")
    try:
        assert set(json.loads(dvc(up_to_date, "status", "--json"))) == stages
    finally:
        if before is None:
            target.unlink()
            if not any(target.parent.iterdir()):
                target.parent.rmdir()
        else:
            target.write_bytes(before)
