"""Loading checks what it loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.models.bundled_weights import BundledModel


class Small(BundledModel):
    name = "small"
    family = "small"
    version = 3
    files = ("small.safetensors", "labels.txt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    payloads = {"small.safetensors": save({"weight": torch.ones(2)}), "labels.txt": b"a\nb\n"}
    for name, payload in payloads.items():
        (tmp_path / name).write_bytes(payload)
    files = {name: {"sha256": sha256_bytes(payload)} for name, payload in payloads.items()}
    (tmp_path / "meta.json").write_text(json.dumps({"files": files}))
    return tmp_path


def test_load_is_idempotent_and_described(folder: Path) -> None:
    encoder = Small(folder).load()
    shutil.rmtree(folder / "none", ignore_errors=True)
    assert encoder.load() is encoder
    assert encoder.weights["weight"].tolist() == [1, 1]
    description = encoder.describe()
    assert description["version"] == 3
    assert list(description["sha256"]) == ["small.safetensors", "labels.txt"]


@pytest.mark.parametrize("name", Small.files)
def test_a_changed_file_is_not_loaded(folder: Path, name: str) -> None:
    payload = bytearray((folder / name).read_bytes())
    payload[-1] ^= 1
    (folder / name).write_bytes(payload)
    with pytest.raises(IntegrityError, match=f"{name}: sha256 expected"):
        Small(folder).load()


def test_missing_files_name_the_stage(folder: Path) -> None:
    (folder / "labels.txt").unlink()
    with pytest.raises(DataError, match=r"labels\.txt is missing.*dvc repro assets"):
        Small(folder).load()
    (folder / "meta.json").unlink()
    with pytest.raises(DataError, match=r"meta\.json is missing"):
        Small(folder).describe()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": {}}'])
def test_a_broken_meta_is_an_integrity_error(folder: Path, text: str) -> None:
    (folder / "meta.json").write_text(text)
    with pytest.raises(IntegrityError, match="does not list"):
        Small(folder).load()


def test_a_file_that_is_not_safetensors_is_refused(folder: Path) -> None:
    (folder / "small.safetensors").write_bytes(b"\x80\x04not tensors")
    files = {name: {"sha256": sha256_bytes((folder / name).read_bytes())} for name in Small.files}
    (folder / "meta.json").write_text(json.dumps({"files": files}))
    with pytest.raises(IntegrityError):
        Small(folder).load()
