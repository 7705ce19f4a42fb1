"""`params.yaml` is written as DVC writes it, so that `dvc exp run -S key=value` changes values alone."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parents[2]


def test_setting_a_value_with_dvc_changes_one_line(tmp_path: Path) -> None:
    hydra = pytest.importorskip("dvc.utils.hydra")
    path = tmp_path / "params.yaml"
    shutil.copy(PROJECT / "params.yaml", path)
    before = path.read_text().splitlines()
    hydra.apply_overrides(str(path), ["train.seed=4711"])
    after = path.read_text()
    changed = [line for line in difflib.ndiff(before, after.splitlines()) if line.startswith(("- ", "+ "))]
    action = "python -c \"from dvc.utils.hydra import apply_overrides as write; write('params.yaml', [])\""
    assert len(changed) == 2, f"{changed[:6]}; let DVC write params.yaml once: {action}"
    assert YAML(typ="safe").load(after)["train"]["seed"] == 4711
