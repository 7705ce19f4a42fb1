"""Checkpoints as the hub serves them: pickled weights, shards with an index, names of weights of older releases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline_steps.core.errors import IntegrityError
from pipeline_steps.models import pickled_weights
from pipeline_steps.models.audio.ast import AstEncoder
from tests.factories.checkpoints.ast import ast_checkpoint
from tests.factories.checkpoints.clap import TEXTS, clap_checkpoint, clap_encoder

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clap_checkpoint(tmp_path_factory.mktemp("published") / "clap")


def pickled(folder: Path, target: Path, shards: int = 1) -> Path:
    """The same checkpoint with weights as `pytorch_model.bin` alone."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(folder / "model.safetensors")
    if shards == 1:
        torch.save(weights, target / "pytorch_model.bin")
        return target
    names = sorted(weights)
    parts = {f"pytorch_model-{at + 1:05d}-of-{shards:05d}.bin": names[at::shards] for at in range(shards)}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, target / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_converted_once_and_give_the_same_vectors(
    clap_folder: Path, tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pickled(clap_folder, tmp_path / "bin", shards)
    expected = clap_encoder(clap_folder).load().text_rows(TEXTS)
    encoder = clap_encoder(folder, tmp_path).load()
    assert np.array_equal(encoder.text_rows(TEXTS), expected)
    (made,) = (path for path in (tmp_path / ".cache/checkpoints").iterdir() if path.is_dir())
    assert encoder.fetch() == made
    assert len(list(made.glob("*.safetensors"))) == shards
    record = json.loads((made / "conversion.json").read_text())
    assert set(record["source"]) == {path.name for path in folder.glob("*.bin")}
    assert {"preprocessor_config.json", "tokenizer.json", "config.json"} <= set(record["files"])
    assert clap_encoder(folder, tmp_path, revision=encoder.identity["sha256"]).fetch() == made

    def not_again(*_: Any) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(pickled_weights, "_convert_in_child", not_again)
    assert clap_encoder(folder, tmp_path).fetch() == made
    weights = made / sorted(path.name for path in made.glob("*.safetensors"))[0]
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(AssertionError, match="converted twice"):  # the hash differs from the recorded one
        clap_encoder(folder, tmp_path).fetch()


def test_a_hub_snapshot_without_safetensors_is_read(clap_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "8" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pickled(clap_folder, tmp_path / f"hub/models--owner--clap/snapshots/{commit}")
    encoder = clap_encoder("owner/clap", tmp_path, revision=commit).load()
    assert encoder.identity == {"model": "owner/clap", "revision": commit}
    assert np.array_equal(encoder.text_rows(TEXTS), clap_encoder(clap_folder).load().text_rows(TEXTS))


class Harmful:
    """Object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_that_would_run_code_is_refused(clap_folder: Path, tmp_path: Path) -> None:
    folder = pickled(clap_folder, tmp_path / "bin")
    torch.save({"weight": Harmful(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match="cannot be converted: UnpicklingError") as caught:
        clap_encoder(folder, tmp_path).fetch()
    assert caught.value.exit_code == 6
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"not a pickle", b""])
def test_a_damaged_file_is_refused(clap_folder: Path, tmp_path: Path, content: bytes) -> None:
    folder = pickled(clap_folder, tmp_path / "bin")
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(IntegrityError, match="cannot be converted"):
        clap_encoder(folder, tmp_path).fetch()


def test_other_contents_than_tensors_are_refused(clap_folder: Path, tmp_path: Path) -> None:
    folder = pickled(clap_folder, tmp_path / "bin")
    torch.save({"epoch": 3, "weight": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match="no mapping of names to dense tensors"):
        clap_encoder(folder, tmp_path).fetch()


def test_memory_and_time_are_limited(clap_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pickled(clap_folder, tmp_path / "bin")
    torch.save({"weight": torch.ones(1).expand(2**34)}, folder / "pytorch_model.bin")  # 64 GiB when written out
    with pytest.raises(IntegrityError, match=r"cannot be converted: .*(memory|ended with)"):
        clap_encoder(folder, tmp_path).fetch()
    monkeypatch.setattr(pickled_weights, "SECONDS", 0.05)
    with pytest.raises(IntegrityError, match="took longer than"):
        clap_encoder(folder, tmp_path).fetch()


@pytest.mark.parametrize("name", ["../outside.bin", "absent.bin"])
def test_an_index_names_files_of_the_folder_only(clap_folder: Path, tmp_path: Path, name: str) -> None:
    folder = pickled(clap_folder, tmp_path / "bin", shards=2)
    shutil.copyfile(next(folder.glob("*.bin")), tmp_path / "outside.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    with pytest.raises(IntegrityError, match="is missing"):
        clap_encoder(folder, tmp_path).fetch()


def test_shards_with_an_index_are_read(clap_folder: Path, tmp_path: Path) -> None:
    from transformers import ClapModel

    folder = tmp_path / "sharded"
    shutil.copytree(clap_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    ClapModel.from_pretrained(clap_folder).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    expected = clap_encoder(clap_folder).load().text_rows(TEXTS)
    assert np.array_equal(clap_encoder(folder).load().text_rows(TEXTS), expected)
    next(folder.glob("model-*-of-*.safetensors")).unlink()
    with pytest.raises(IntegrityError, match="cannot be loaded"):
        clap_encoder(folder).load()


def test_names_of_weights_in_published_files_are_read(tmp_path: Path) -> None:
    """AST of the hub has query, key and value of every layer under `attention.attention`."""
    folder = ast_checkpoint(tmp_path / "ast")
    weights = load_file(folder / "model.safetensors")
    name = "audio_spectrogram_transformer.encoder.layer.0.attention.attention.query.weight"
    assert name in weights, "save_pretrained writes the published names"
    sound = np.sin(np.arange(48_000, dtype=np.float32))
    before = AstEncoder(str(folder)).tokens(sound)
    save_file(
        {key: value * (2 if key == name else 1) for key, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    assert not np.allclose(AstEncoder(str(folder)).tokens(sound), before), "the weight is used"
