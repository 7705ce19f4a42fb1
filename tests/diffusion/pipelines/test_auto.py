"""Exported models: every weight is loaded, and modified folders are rejected before they are used."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from pipeline_steps.core.errors import DataError, IntegrityError
from pipeline_steps.core.hashing import sha256_bytes
from pipeline_steps.diffusion.pipelines.auto import AutoAudio2ImagePipeline
from pipeline_steps.diffusion.pipelines.ip_adapter import RESAMPLER, AudioIPAdapterPipeline


@pytest.fixture
def copy(exported_model: Path, tmp_path: Path) -> Path:
    """Copy of an exported model, to be modified."""
    shutil.copytree(exported_model, tmp_path / "model")
    return tmp_path / "model"


def rehash(folder: Path, payload: bytes) -> None:
    """Write a weight file and make the index agree, as an attacker would."""
    (folder / RESAMPLER).write_bytes(payload)
    index = json.loads((folder / "model_index.json").read_text())
    index["sha256"][RESAMPLER] = sha256_bytes(payload)
    (folder / "model_index.json").write_text(json.dumps(index))


def test_every_saved_weight_is_loaded(exported_model: Path) -> None:
    """Two loads are equal, so no part keeps its initial random weights."""
    states = []
    for _ in range(2):
        pipeline = AutoAudio2ImagePipeline.from_pretrained(exported_model, "cpu")
        assert isinstance(pipeline, AudioIPAdapterPipeline)
        states.append(pipeline.adapter.state_dict())
    assert states[0].keys() == states[1].keys()
    assert not [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]


def test_a_changed_byte_is_rejected(copy: Path) -> None:
    payload = bytearray((copy / RESAMPLER).read_bytes())
    payload[-1] ^= 1
    (copy / RESAMPLER).write_bytes(payload)
    with pytest.raises(IntegrityError, match="sha256"):
        AutoAudio2ImagePipeline.from_pretrained(copy)


def test_wrong_shapes_missing_keys_and_broken_headers_are_rejected(copy: Path) -> None:
    state = load((copy / RESAMPLER).read_bytes())
    for broken, words in (
        ({**state, "queries": torch.zeros(3)}, "queries has shape"),
        ({key: value for key, value in state.items() if key != "silence"}, "key silence is missing"),
        ({**state, "extra": torch.zeros(1)}, "key extra is unknown"),
    ):
        rehash(copy, save(broken))
        with pytest.raises(IntegrityError, match=words):
            AutoAudio2ImagePipeline.from_pretrained(copy)
    rehash(copy, (2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(IntegrityError, match="not a safetensors"):
        AutoAudio2ImagePipeline.from_pretrained(copy)
    (copy / RESAMPLER).unlink()
    with pytest.raises(DataError, match="missing"):
        AutoAudio2ImagePipeline.from_pretrained(copy)


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_pickles_are_never_loaded(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    rehash(copy, pickle.dumps(_Payload(marker)))
    with pytest.raises(IntegrityError):
        AutoAudio2ImagePipeline.from_pretrained(copy)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["auto_map", "trust_remote_code"])
@pytest.mark.parametrize("name", ["resampler/config.json", "scheduler/scheduler_config.json"])
def test_foreign_code_in_a_config_is_rejected(copy: Path, name: str, key: str) -> None:
    path = copy / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "nested": {key: True}}))
    with pytest.raises(IntegrityError, match="foreign code"):
        AutoAudio2ImagePipeline.from_pretrained(copy)


def test_an_unknown_class_and_an_older_format_are_rejected(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    for changes, words in (({"_class_name": "OtherPipeline"}, "unknown _class_name"), ({"format": 1}, "not a .* of format 2")):
        (copy / "model_index.json").write_text(json.dumps(index | changes))
        with pytest.raises(IntegrityError, match=words):
            AutoAudio2ImagePipeline.from_pretrained(copy)
